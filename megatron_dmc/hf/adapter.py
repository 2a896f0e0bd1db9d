"""The adapter that decides, among transformers' modules: where published models of DMS have it, and by its names.

Legend: T packed tokens, H hidden size, G KV heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.models.config import ModelConfig


def add_adapter(attention: torch.nn.Module, shape: ModelConfig) -> None:
    """Give an attention module the adapter of a model that has one."""
    if shape.adapter:
        attention.dms_proj_alpha_norm = torch.nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        attention.dms_proj_alpha = torch.nn.Linear(shape.hidden_size, shape.num_kv_heads, bias=False)


def adapter_output(attention: torch.nn.Module, hidden_TH: Tensor) -> Tensor | None:
    """float32 [T, G] from the state before a layer's first norm; None where there is no adapter. See ``Decoder``."""
    norm, projection = (getattr(attention, name, None) for name in ("dms_proj_alpha_norm", "dms_proj_alpha"))
    if norm is None or projection is None:
        return None
    weight_H = norm.weight.float()
    return F.linear(F.rms_norm(hidden_TH.float(), weight_H.shape, weight_H, norm.eps), projection.weight.float())

"""Quantisation of any number of entries at once.

Shapes: D channels of an entry; leading dimensions are entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.kv_quantization.formats import SMALLEST, KVFormat


def quantise(x: Tensor, kv_format: KVFormat) -> tuple[Tensor, Tensor]:
    """Store entries [..., D] in 8 bits.

    Returns:
        [..., D] in the dtype of ``kv_format``, and the scale of each entry, float32 [...]. An entry of zeros is stored
        as zeros, with a scale that is a number.
    """
    assert kv_format.dtype is not None, f"{kv_format.name} stores entries as they are"
    x = x.float()
    scale = x.abs().amax(-1).clamp(min=SMALLEST) / kv_format.largest
    stored = x / scale.unsqueeze(-1)
    if kv_format.dtype == torch.int8:
        stored = stored.round()
    # The division may end one rounding above the largest number.
    return stored.clamp(-kv_format.largest, kv_format.largest).to(kv_format.dtype), scale


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries [..., D] as ``dtype``, from what :func:`quantise` returned."""
    return (stored.float() * scale.unsqueeze(-1)).to(dtype)

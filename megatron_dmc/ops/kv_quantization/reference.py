"""Quantisation of one entry, channel by channel: the plain form.

Shapes: D channels of one entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.kv_quantization.formats import SMALLEST, KVFormat


def quantise(x_D: Tensor, kv_format: KVFormat) -> tuple[Tensor, float]:
    """Stored channels and the scale of one entry: symmetric, the largest magnitude becomes ``kv_format.largest``."""
    assert kv_format.dtype is not None
    magnitude = max(abs(x) for x in x_D.tolist())
    scale = max(magnitude, SMALLEST) / kv_format.largest
    # Python and torch round halves to even, as the formats of 8 bits do.
    channels = [round(x / scale) if kv_format.dtype == torch.int8 else x / scale for x in x_D.tolist()]
    return torch.tensor(channels).to(kv_format.dtype), scale


def dequantise(stored_D: Tensor, scale: float) -> Tensor:
    """float32 channels of one stored entry."""
    return torch.tensor([x * scale for x in stored_D.float().tolist()])

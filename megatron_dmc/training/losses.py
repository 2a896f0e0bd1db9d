"""The losses of a micro-batch.

Legend: B batch, S sequence (local under context parallelism).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_tokens(loss_BS: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the token losses that count, and their number (int32), both scalars."""
    mask = mask_BS.reshape(-1).float()
    return torch.sum(loss_BS.reshape(-1).float() * mask), mask.sum().to(torch.int32)


def compression_loss(fraction_B: Tensor, target_fraction: float) -> Tensor:
    """One-sided loss of each sequence ([DMC] eq. 11): max(0, target - share of accumulating decisions), [B]."""
    return torch.clamp(target_fraction - fraction_B, min=0.0)

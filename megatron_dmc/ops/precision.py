"""Which precision sums have, and which weights they cannot feel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE_WEIGHT = 1e-20
"""Far below the rounding of float64 (1e-16), far above the smallest normal float32 (1e-38)."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_negligible(weights: Tensor) -> Tensor:
    """Non-negative weights of order 1, with 0 in place of those that no sum can feel.

    Products of small weights would be denormal numbers, with which a CPU computes many times slower.
    """
    return F.threshold(weights, NEGLIGIBLE_WEIGHT, 0.0)

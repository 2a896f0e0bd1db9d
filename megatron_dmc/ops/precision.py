"""Accumulation in float32, a few rows at a time."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

NEGLIGIBLE_WEIGHT = 1e-20
"""Far below the rounding of float64 (1e-16), far above the smallest normal float32 (1e-38)."""

SLICE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements per slice of element-wise work: temporaries stay in the cache of a CPU, launches few on a GPU."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_negligible(weights: Tensor) -> Tensor:
    """Non-negative weights of order 1, with 0 in place of those that no sum can feel.

    Products of small weights would be denormal numbers, with which a CPU computes many times slower.
    """
    return F.threshold(weights, NEGLIGIBLE_WEIGHT, 0.0)


def row_slices(x: Tensor, dim: int = 0) -> Iterator[slice]:
    """Slices of dimension ``dim`` of ``x`` for element-wise work."""
    rows = max(1, SLICE_ELEMENTS.get(x.device.type, SLICE_ELEMENTS["cuda"]) * x.shape[dim] // max(1, x.numel()))
    for start in range(0, x.shape[dim], rows):
        yield slice(start, min(start + rows, x.shape[dim]))

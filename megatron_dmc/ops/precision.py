"""Accumulation in float32, a few rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Elements per slice of element-wise work: temporaries stay in the cache of a CPU, launches few on a GPU."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_slices(x: Tensor, num_rows: int | None = None) -> Iterator[slice]:
    """Slices of the first dimension of ``x``, or of ``num_rows`` rows as large as those of ``x``."""
    total = x.shape[0] if num_rows is None else num_rows
    rows = max(1, SLICE_ELEMENTS.get(x.device.type, SLICE_ELEMENTS["cuda"]) // max(1, x[0].numel()))
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))

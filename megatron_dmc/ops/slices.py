"""Element-wise work on large tensors, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

SLICE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements per slice of element-wise work: temporaries stay in the cache of a CPU, launches few on a GPU."""


def row_slices(x: Tensor, dim: int = 0) -> Iterator[slice]:
    """Slices of dimension ``dim`` of ``x`` for element-wise work."""
    rows = max(1, SLICE_ELEMENTS.get(x.device.type, SLICE_ELEMENTS["cuda"]) * x.shape[dim] // max(1, x.numel()))
    for start in range(0, x.shape[dim], rows):
        yield slice(start, min(start + rows, x.shape[dim]))

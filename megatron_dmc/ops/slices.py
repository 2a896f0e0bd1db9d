"""Element-wise work on large tensors, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

SLICE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}
"""Elements per slice of element-wise work: temporaries stay in the cache of a CPU, launches few on a GPU."""


def row_slices(x: Tensor, dim: int = 0) -> Iterator[slice]:
    """Slices of dimension ``dim`` of ``x`` for element-wise work."""
    rows = _rows_per_slice(x, dim)
    for start in range(0, x.shape[dim], rows):
        yield slice(start, min(start + rows, x.shape[dim]))


def in_slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equally many rows, some rows at a time as :func:`row_slices` cuts the first."""
    rows = _rows_per_slice(tensors[0], 0)
    if rows >= len(tensors[0]):
        yield tensors
    else:
        yield from zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _rows_per_slice(x: Tensor, dim: int) -> int:
    elements = SLICE_ELEMENTS.get(x.device.type, SLICE_ELEMENTS["cuda"])
    return max(1, elements * x.shape[dim] // max(1, x.numel()))

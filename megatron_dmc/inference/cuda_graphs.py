"""Steps of decoding captured as CUDA graphs: one launch for all kernels of a step.

A graph has one batch size. There is one for each of a few sizes, and a batch runs in the smallest that it fits, its
other places filled with row -1, which is no sequence.

Legend: B sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

WARM_UPS = 2
"""Runs before a capture: kernels are compiled and loaded in the first, which a capture does not allow."""


def batch_sizes(max_batch: int) -> list[int]:
    """Powers of two, and the largest batch."""
    sizes = [1 << power for power in range(max_batch.bit_length())]
    return sizes if sizes[-1] == max_batch else [*sizes, max_batch]


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: Tensor


class CapturedSteps:
    """A step for batches of up to so many sequences.

    Args:
        step: from token, row and position of each sequence (int64 [B]) to a result [B, ...]. All else that it reads and
            writes stays where it is, it asks the GPU for nothing, and does nothing for row -1.
        sizes: batch sizes to capture, see :func:`batch_sizes`.
        device: a GPU.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor, Tensor], Tensor], sizes: Sequence[int], device: torch.device
    ) -> None:
        self._step = step
        self._token, self._row, self._position = (
            torch.full((max(sizes),), value, dtype=torch.int64, device=device) for value in (0, -1, 0)
        )
        self._captured: dict[int, _Captured] = {}
        pool = None
        # The largest first: the others find room in its memory.
        for size in sorted(sizes, reverse=True):
            captured = self._capture(size, pool)
            pool = captured.graph.pool()
            self._captured[size] = captured

    def _capture(self, size: int, pool: Any) -> _Captured:
        inputs = (self._token[:size], self._row[:size], self._position[:size])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = self._step(*inputs)
        return _Captured(graph, result)

    def __call__(self, token_B: Tensor, row_B: Tensor, position_B: Tensor) -> Tensor:
        """The result of one step; it is overwritten by the next one."""
        batch = len(token_B)
        size = min(size for size in self._captured if size >= batch)
        self._row[batch:size] = -1
        for static, given in ((self._token, token_B), (self._row, row_B), (self._position, position_B)):
            static[:batch].copy_(given)
        captured = self._captured[size]
        captured.graph.replay()
        return captured.result[:batch]

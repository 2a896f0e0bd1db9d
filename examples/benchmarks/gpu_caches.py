"""Head caches of random lengths in GPU memory, in the layout that attention reads; and time on a GPU.

Legend: L layers, B sequences, N query heads, G KV heads, D head dim, P entries per block, M blocks per head cache, E
entries.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.kv_quantization import find_kv_format
from megatron_dmc.ops.paged_kv import PagedKV

DTYPE = torch.bfloat16
CACHE_OF_GPU = 1 << 30
"""Bytes of entries over all layers that no cache of a GPU holds (50 MB on Hopper): every layer comes from memory."""


@dataclass(frozen=True)
class Shape:
    """The caches of one step.

    Args:
        batch: sequences.
        num_kv_heads, group, head_dim: of the model; ``group`` query heads per KV head.
        context: tokens of each sequence.
        compression_ratio: tokens / mean entries.
        sigma: of the log-normal lengths of head caches; none is longer than the context.
        kv_dtype: ``auto``, ``fp8`` or ``int8``.
        block_size: entries per block.
        num_layers: 0 for as many as a GPU cannot keep in its caches.
    """

    batch: int
    num_kv_heads: int = 32
    group: int = 1
    head_dim: int = 128
    context: int = 4096
    compression_ratio: float = 1.0
    sigma: float = 0.0
    kv_dtype: str = "auto"
    block_size: int = 32
    num_layers: int = 0

    @property
    def entry_bytes(self) -> float:
        """Key and value of one entry, and their scales."""
        stored = find_kv_format(self.kv_dtype)
        return stored.block_bytes(self.block_size, self.head_dim, DTYPE) / self.block_size

    def lengths(self, device: str) -> Tensor:
        """int32 [L, B, G]."""
        generator = torch.Generator(device).manual_seed(0)
        mean = self.context / self.compression_ratio
        layer_bytes = self.batch * self.num_kv_heads * mean * self.entry_bytes
        num_layers = self.num_layers or min(max(round(CACHE_OF_GPU / layer_bytes), 2), 32)
        normal = torch.randn(num_layers, self.batch, self.num_kv_heads, generator=generator, device=device)
        drawn = mean * torch.exp(self.sigma * normal - self.sigma**2 / 2)
        return drawn.round().clamp(1, self.context).to(torch.int32)

    def conditions(self) -> dict[str, Any]:
        """For a row."""
        return {**dataclasses.asdict(self), "dtype": str(DTYPE), "heads of the batch": self.batch * self.num_kv_heads}


class Caches(NamedTuple):
    """Random contents; blocks of one pool in random order."""

    kv: PagedKV
    """Open entries of all layers, [L, B, G, ...]."""
    table_LBGM: Tensor
    length_LBG: Tensor

    def of_layer(self, layer: int) -> tuple[PagedKV, Tensor, Tensor]:
        """What attention takes."""
        return self.kv.of_rows(layer), self.table_LBGM[layer], self.length_LBG[layer]

    @property
    def num_entries(self) -> int:
        """Over all layers."""
        return int(self.length_LBG.sum(dtype=torch.int64))


def make_caches(shape: Shape, device: str, *, spare_entries: int = 0, dtype: torch.dtype = DTYPE) -> Caches:
    """Caches of a shape, whose tables have blocks for ``spare_entries`` more entries of each head."""
    length_LBG = shape.lengths(device)
    needed_LBG = (length_LBG + spare_entries + shape.block_size - 1) // shape.block_size
    num_blocks, width = int(needed_LBG.sum(dtype=torch.int64)), int(needed_LBG.max())
    table = torch.zeros(*length_LBG.shape, width, dtype=torch.int32, device=device)
    is_held = torch.arange(width, device=device) < needed_LBG.unsqueeze(-1)
    table.masked_scatter_(is_held, torch.randperm(num_blocks, device=device).to(torch.int32))
    pool = (num_blocks, shape.block_size, shape.head_dim)
    return Caches(_random_pool(pool, length_LBG.shape, shape, device, dtype), table, length_LBG)


def _random_pool(
    pool: tuple[int, ...], heads: tuple[int, ...], shape: Shape, device: str, dtype: torch.dtype
) -> PagedKV:
    stored = find_kv_format(shape.kv_dtype)
    if stored.dtype is None:
        return PagedKV(*(torch.empty(pool, dtype=dtype, device=device).normal_() for _ in range(2)))
    blocks = [torch.randint(-120, 120, pool, dtype=torch.int8, device=device) for _ in range(2)]
    if stored.dtype != torch.int8:
        # Bits of which none is NaN: exponents below the largest.
        blocks = [(x & ~0x08).view(stored.dtype) for x in blocks]
    scales = [torch.rand(pool[:2], device=device) / stored.largest for _ in range(2)]
    heads = (*heads, shape.head_dim)
    opens = [torch.randn(heads, device=device).to(dtype) for _ in range(2)]
    return PagedKV(*blocks, *scales, *opens, torch.full(heads[:-1], -1, dtype=torch.int32, device=device))


def gpu_seconds(run: Callable[[], object], repeats: int = 20) -> tuple[float, bool]:
    """Median seconds of a run whose launches are captured in a CUDA graph, and whether they could be.

    What cannot be captured is launched again each time, and the clock then covers the launches. Without a GPU it runs
    once, to be tried out.
    """
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, False
    run()
    torch.cuda.synchronize()
    replay, captured = run, True
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError:
        captured = False
        torch.cuda.synchronize()
    seconds = []
    for turn in range(repeats + 2):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        replay()
        after.record()
        after.synchronize()
        if turn >= 2:
            seconds.append(before.elapsed_time(after) / 1000)
    return statistics.median(seconds), captured


def copy_bandwidth(device: str, num_bytes: int = 4 << 30) -> float:
    """Bytes per second that a large copy reads and writes together."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds, _ = gpu_seconds(lambda: target.copy_(source))
    return 2 * num_bytes / seconds


class Deadline:
    """Time that a lease has left.

    Args:
        minutes: of the lease.
    """

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        """Whether nothing new should begin."""
        return time.monotonic() > self._end

    def share(self, number: int) -> Deadline:
        """One of ``number`` equal shares of what is left."""
        return Deadline((self._end - time.monotonic()) / 60 / number)

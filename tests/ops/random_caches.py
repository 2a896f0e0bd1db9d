"""Head caches of random lengths in a paged pool, for tests of what reads them.

Shapes: B sequences, G KV heads, D head dim, P entries per block, M blocks per head cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.ops.kv_quantization import find_kv_format
from megatron_dmc.ops.paged_attention import write_entries
from megatron_dmc.ops.paged_kv import PagedKV

NUM_BLOCKS_LEFT = 3
"""Blocks of the pool that nobody holds."""


def random_cache(
    length_BG: Sequence[Sequence[int]],
    head_dim: int,
    block_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    kv_dtype: str = "auto",
    open_entries: bool = True,
    seed: int = 3,
) -> tuple[PagedKV, Tensor, Tensor]:
    """Keys and values, block table and lengths. Blocks are dealt at random; what was never written is NaN, or as far
    from the truth as 8 bits allow; tables point outside the pool behind what a head needs.

    With ``open_entries`` the newest entry of every second head cache is open where the pool is quantised.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(length_BG, dtype=torch.int32)
    needed_BG = (lengths + block_size - 1) // block_size
    width, total = int(needed_BG.max()) + 1, int(needed_BG.sum()) + NUM_BLOCKS_LEFT
    table = torch.full((*lengths.shape, width), 2**30, dtype=torch.int32)
    table[torch.arange(width) < needed_BG.unsqueeze(-1)] = torch.randperm(total, generator=generator)[
        :-NUM_BLOCKS_LEFT
    ].to(torch.int32)
    kv = _unwritten(total, block_size, head_dim, lengths, dtype, kv_dtype, open_entries)
    for b, g in torch.cartesian_prod(*(torch.arange(n) for n in lengths.shape)).tolist():
        for entry in range(int(lengths[b, g])):
            key, value = (torch.randn(head_dim, generator=generator) for _ in range(2))
            if kv.open_entry_BG is not None and entry == int(kv.open_entry_BG[b, g]):
                kv.k_open[b, g], kv.v_open[b, g] = key, value
            else:
                slot = int(table[b, g, entry // block_size]) * block_size + entry % block_size
                write_entries(kv, torch.tensor([slot]), key.unsqueeze(0), value.unsqueeze(0))
    return kv, table, lengths


def _unwritten(
    total: int, block_size: int, head_dim: int, lengths: Tensor, dtype: torch.dtype, kv_dtype: str, open_entries: bool
) -> PagedKV:
    stored = find_kv_format(kv_dtype).dtype
    unwritten = 127 if stored == torch.int8 else torch.nan
    k_blocks, v_blocks = (torch.full((total, block_size, head_dim), unwritten, dtype=stored or dtype) for _ in range(2))
    if stored is None:
        return PagedKV(k_blocks, v_blocks)
    k_scale, v_scale = (torch.full((total, block_size), torch.nan) for _ in range(2))
    if not open_entries:
        return PagedKV(k_blocks, v_blocks, k_scale, v_scale)
    k_open, v_open = (torch.full((*lengths.shape, head_dim), torch.nan, dtype=dtype) for _ in range(2))
    every_second = (torch.arange(lengths.numel()) % 2 == 0).view(lengths.shape)
    open_entry = torch.where(every_second, lengths - 1, -1).to(torch.int32)
    return PagedKV(k_blocks, v_blocks, k_scale, v_scale, k_open, v_open, open_entry)

"""Attention over the paged cache: the one public function, and which form of it runs where.

Legend: B sequences, N query heads, G KV heads, R = N / G, D head dim, P entries per block, M blocks per head cache.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron_dmc.ops.paged_attention import gather
from megatron_dmc.ops.paged_attention.work_list import WorkList
from megatron_dmc.ops.paged_kv import PagedKV
from megatron_dmc.ops.triton_kernels import load


def paged_attention(
    q_BND: Tensor,
    kv: PagedKV,
    block_table_BGM: Tensor,
    cache_seqlens_BG: Tensor,
    *,
    rows_B: Tensor | None = None,
    work: WorkList | None = None,
) -> Tensor:
    """Attention of one query per sequence over its own cache, whose heads have lengths of their own.

    Args:
        q_BND: rotated queries; query head n reads KV head n // (N / G). Scores are scaled by 1 / sqrt(D).
        kv: rotated keys and values.
        block_table_BGM: int32 blocks of each head cache in order; those beyond its length are never read.
        cache_seqlens_BG: int32 entries of each head cache, at least 1.
        rows_B: int64 row of each sequence in the block table, the lengths and the open entries of ``kv``; None:
            sequence b is row b. On a GPU -1 is no sequence: its output is 0.
        work: chunks of this layer, if the caller made them for all layers at once; GPUs alone need them.

    Returns:
        [B, N, D] in the dtype of ``q_BND``.
    """
    split_attention = kernels_for(q_BND.device.type, q_BND.dtype)
    if split_attention is not None:
        output_BND: Tensor = split_attention.attend(
            q_BND, kv, block_table_BGM, cache_seqlens_BG, rows_B=rows_B, work=work
        )[0]
        return output_BND
    if rows_B is not None:
        kv, block_table_BGM, cache_seqlens_BG = kv.of_rows(rows_B), block_table_BGM[rows_B], cache_seqlens_BG[rows_B]
    return gather.paged_attention(q_BND, kv, block_table_BGM, cache_seqlens_BG)


def kernels_for(device_type: str, dtype: torch.dtype) -> ModuleType | None:
    """The form for GPUs where it runs, None where torch operations do."""
    return load("attention over the cache", "megatron_dmc.ops.paged_attention.split_attention", device_type, dtype)

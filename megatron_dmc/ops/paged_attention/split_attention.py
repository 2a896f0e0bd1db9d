"""Split attention for decoding: the launch of its kernels.

Legend: B sequences, N query heads, G KV heads, R = N / G, D head dim, P entries per block, M blocks per head cache, E
entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_dmc.ops.paged_attention import kernels
from megatron_dmc.ops.paged_attention.work_list import WorkList, lengths_of_rows, work_list
from megatron_dmc.ops.paged_kv import PagedKV

MIN_ROWS = 16
"""Rows that a matrix product takes at least."""
REDUCE_CHUNKS = 16
"""Partial results that are added at a time."""
LOG2_E = 1.4426950408889634


class Tuning(NamedTuple):
    """Sizes that change speed, never results beyond rounding."""

    block_e: int
    """Entries of a tile, a power of two."""
    num_stages: int
    """Tiles under way at one time, with matrix products; with vectors the other programs fill the time."""
    num_warps: int
    programs: int
    """Persistent programs for each multiprocessor; no more than fit, or the last ones run alone."""


def tuning(group: int, head_dim: int, itemsize: int) -> Tuning:
    """For so many query heads per KV head, channels, and bytes per stored number.

    Chosen by the registers that the compiler for Hopper takes: nothing spills, all programs fit at once, and 48 KiB or
    more are under way on each multiprocessor, twice what its share of the memory's bandwidth needs. Not yet timed.
    """
    tile_bytes = 8192 if group == 1 else 16384
    block_e = min(max(tile_bytes // (triton.next_power_of_2(head_dim) * itemsize), 16), 64)
    return Tuning(block_e, num_stages=3, num_warps=4, programs=4 - (group > 1) - (itemsize == 1))


class _Partial(NamedTuple):
    """What chunks leave, float32: maximum and sum of a softmax [chunks, R], weighted values [chunks, R, D]."""

    maximum: Tensor
    total: Tensor
    acc: Tensor


_Caches = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]
"""Block table, lengths, rows, order and start of the head caches."""


def attend(
    q_BND: Tensor,
    kv: PagedKV,
    block_table_BGM: Tensor,
    cache_seqlens_BG: Tensor,
    *,
    rows_B: Tensor | None = None,
    work: WorkList | None = None,
    keep_weights: bool = False,
    sizes: Tuning | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Arguments as in :func:`megatron_dmc.ops.paged_attention.paged_attention`; head caches may be empty.

    Returns:
        Output [B, N, D] in the dtype of the queries, log-sum-exp of the scores, float32 [B, N], and with
        ``keep_weights`` the weights, float32 [B, G, R, M P]. An empty head cache gives zeros, and -inf.
    """
    assert q_BND.stride(-1) == 1
    assert all(x.is_contiguous() for x in (block_table_BGM, cache_seqlens_BG, *kv) if x is not None)
    length_BG = cache_seqlens_BG if rows_B is None else lengths_of_rows(cache_seqlens_BG, rows_B)
    work = work or work_list(length_BG)
    group = q_BND.shape[1] // block_table_BGM.shape[1]
    max_entries = block_table_BGM.shape[2] * kv.block_size
    scores = _empty(q_BND, *length_BG.shape, group, max_entries) if keep_weights else None
    partial = _Partial(
        _empty(q_BND, work.max_chunks(max_entries), group),
        _empty(q_BND, work.max_chunks(max_entries), group),
        _empty(q_BND, work.max_chunks(max_entries), group, kv.head_dim),
    )
    caches = (block_table_BGM, cache_seqlens_BG, rows_B, work.order_H, work.start_H)
    with torch.cuda.device_of(q_BND):
        _attend_to_chunks(q_BND, kv, caches, work, partial, scores, sizes)
        output_BND, lse_BN = _add_chunks(q_BND, kv, caches, work, partial)
    return output_BND, lse_BN, None if scores is None else _weights(scores, lse_BN, length_BG)


def _attend_to_chunks(
    q_BND: Tensor,
    kv: PagedKV,
    caches: _Caches,
    work: WorkList,
    partial: _Partial,
    scores: Tensor | None,
    sizes: Tuning | None,
) -> None:
    group = partial.maximum.shape[1]
    sizes = sizes or tuning(group, kv.head_dim, kv.k_blocks.itemsize)
    num_programs = min(len(partial.maximum), sizes.programs * _num_processors(q_BND.device))
    kernels.chunk_kernel[(num_programs,)](
        q_BND,
        *kv,
        *caches,
        *partial,
        scores,
        *q_BND.stride()[:2],
        len(work.order_H),
        caches[0].shape[1],
        caches[0].shape[2],
        LOG2_E * kv.head_dim**-0.5,
        R=group,
        D=kv.head_dim,
        P=kv.block_size,
        CHUNK=work.chunk_size,
        BLOCK_R=1 if group == 1 else max(MIN_ROWS, triton.next_power_of_2(group)),
        BLOCK_D=triton.next_power_of_2(kv.head_dim),
        BLOCK_E=sizes.block_e,
        NUM_STAGES=sizes.num_stages,
        num_warps=sizes.num_warps,
        enable_fp_fusion=True,
    )


def _add_chunks(
    q_BND: Tensor, kv: PagedKV, caches: _Caches, work: WorkList, partial: _Partial
) -> tuple[Tensor, Tensor]:
    """Output [B, N, D] and log-sum-exp [B, N]."""
    group = partial.maximum.shape[1]
    output_BND = torch.empty(q_BND.shape, dtype=q_BND.dtype, device=q_BND.device)
    lse_BN = _empty(q_BND, *q_BND.shape[:2])
    kernels.reduce_kernel[(len(work.order_H), group)](
        *partial,
        output_BND,
        lse_BN,
        *caches[1:],
        caches[0].shape[1],
        R=group,
        D=kv.head_dim,
        CHUNK=work.chunk_size,
        BLOCK_D=triton.next_power_of_2(kv.head_dim),
        BLOCK_C=REDUCE_CHUNKS,
        enable_fp_fusion=True,
    )
    return output_BND, lse_BN


def _weights(scores_BGRE: Tensor, lse_BN: Tensor, length_BG: Tensor) -> Tensor:
    """float32 [B, G, R, E], 0 beyond the length of a head, where no score was stored."""
    filled_BGE = torch.arange(scores_BGRE.shape[-1], device=scores_BGRE.device) < length_BG.unsqueeze(-1)
    weights_BGRE = torch.exp2(scores_BGRE - LOG2_E * lse_BN.view(*scores_BGRE.shape[:3], 1))
    return torch.where(filled_BGE.unsqueeze(2), weights_BGRE, 0.0)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

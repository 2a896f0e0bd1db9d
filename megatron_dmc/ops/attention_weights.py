"""The weights that attention gives to its keys, for methods that evict by them. Never part of attention itself.

Shapes: T packed queries, B sequences, N query heads, G KV heads, R = N / G, D head dim, S tokens of a sequence, M
blocks per head cache, E longest cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_dmc.ops.paged_attention import read_keys
from megatron_dmc.ops.paged_attention.dispatch import kernels_for
from megatron_dmc.ops.paged_kv import PagedKV

BLOCK = 128
"""Queries whose weights exist at one time."""


def decode_weights(q_BND: Tensor, kv: PagedKV, block_table_BGM: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
    """Weights of one query per sequence over its cache, float32 [B, G, R, E]; 0 beyond the length of a head.

    Arguments as in :func:`megatron_dmc.ops.paged_attention.paged_attention`. E is the longest cache or more.
    """
    split_attention = kernels_for(q_BND.device.type, q_BND.dtype)
    if split_attention is not None:
        weights_BGRE: Tensor = split_attention.attend(q_BND, kv, block_table_BGM, cache_seqlens_BG, keep_weights=True)[
            2
        ]
        return weights_BGRE
    entry_E = torch.arange(int(cache_seqlens_BG.max()), device=q_BND.device)
    filled_BGE = entry_E < cache_seqlens_BG.unsqueeze(-1)
    k_BGED = read_keys(kv, block_table_BGM, torch.where(filled_BGE, entry_E, 0), q_BND.dtype).float()
    q_BGRD = q_BND.unflatten(1, (cache_seqlens_BG.shape[1], -1)).float()
    scores = torch.einsum("bgrd,bged->bgre", q_BGRD, k_BGED) * q_BND.shape[-1] ** -0.5
    return scores.masked_fill(~filled_BGE.unsqueeze(2), -torch.inf).softmax(-1)


def prompt_weights(q_TND: Tensor, k_TGD: Tensor, counts: Sequence[int], *, last: bool) -> list[Tensor]:
    """Weights over each whole prompt: of its last query, or summed over all its queries.

    Args:
        q_TND, k_TGD: rotated queries and keys, those of one sequence after those of another.
        counts: tokens of each sequence.
        last: the last query alone.

    Returns:
        For every sequence float32 [G, R, S].
    """
    sums = []
    for q_SND, k_SGD in zip(q_TND.split(list(counts)), k_TGD.split(list(counts)), strict=True):
        blocks = _causal_weights(q_SND, k_SGD, len(q_SND) - 1 if last else 0)
        sums.append(torch.stack([weights.sum(dim=2) for weights in blocks]).sum(dim=0))
    return sums


def _causal_weights(q_SND: Tensor, k_SGD: Tensor, first: int) -> Iterator[Tensor]:
    """Weights [G, R, queries, S] of the queries from ``first`` on, some at a time."""
    length, num_kv_heads, head_dim = k_SGD.shape
    key_S = torch.arange(length, device=k_SGD.device)
    for start in range(first, length, BLOCK):
        q = q_SND[start : start + BLOCK].float().unflatten(1, (num_kv_heads, -1))
        scores = torch.einsum("qgrd,sgd->grqs", q, k_SGD.float()) * head_dim**-0.5
        query_Q1 = torch.arange(start, start + len(q), device=k_SGD.device).unsqueeze(-1)
        yield scores.masked_fill(key_S > query_Q1, -torch.inf).softmax(-1)

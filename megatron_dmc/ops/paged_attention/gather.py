"""Attention over a paged cache in PyTorch: entries gathered through the block tables, then dense attention.

Legend: B sequences, N query heads, G KV heads, R = N / G, D head dim, P entries per block, M blocks per head cache,
E longest cache, T packed queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.paged_attention.entries import read_keys, read_values
from megatron_dmc.ops.paged_kv import PagedKV
from megatron_dmc.ops.precision import accumulation_dtype

BLOCK = 128
"""Queries whose scores exist at one time."""


def paged_attention(q_BND: Tensor, kv: PagedKV, block_table_BGM: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
    """See :func:`megatron_dmc.ops.paged_attention.paged_attention`; every head cache has an entry at least."""
    entry_E = torch.arange(int(cache_seqlens_BG.max()), device=q_BND.device)
    filled_BGE = entry_E < cache_seqlens_BG.unsqueeze(-1)
    # Beyond the length of a head its first entry is read again: unwritten memory could be NaN, which no mask hides.
    place_BGE = torch.where(filled_BGE, entry_E, 0)
    k_BGED, v_BGED = (read(kv, block_table_BGM, place_BGE, q_BND.dtype) for read in (read_keys, read_values))
    q_BGRD = q_BND.unflatten(1, (cache_seqlens_BG.shape[1], -1))
    output_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGED, v_BGED, attn_mask=filled_BGE.unsqueeze(2))
    return output_BGRD.reshape(q_BND.shape)


def paged_attention_to_chunks(
    q_TND: Tensor,
    counts: Sequence[int],
    kv: PagedKV,
    block_table_BGM: Tensor,
    cache_seqlens_BG: Tensor,
    num_queries_BGE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of several queries per sequence, each over all of its sequence's cache, or a part that shrinks.

    Args:
        q_TND: rotated queries, those of one sequence after those of another.
        counts: queries of each sequence.
        kv, block_table_BGM, cache_seqlens_BG: as in :func:`megatron_dmc.ops.paged_attention.paged_attention`; lengths
            may be 0.
        num_queries_BGE: int32 how many of its sequence's queries, the first ones, see each entry; None: all of them.

    Returns:
        Output [N, T, D] in the dtype of ``q_TND``, and log-sum-exp of the scores [N, T], -inf over no entries.
    """
    found = []
    for index, q_ND in enumerate(q_TND.split(list(counts))):
        length_G = cache_seqlens_BG[index]
        entry_E = torch.arange(max(int(length_G.max()), 1), device=q_TND.device)
        filled_GE = entry_E < length_G.unsqueeze(-1)
        places_1GE = torch.where(filled_GE, entry_E, 0).unsqueeze(0)
        row = slice(index, index + 1)
        cache = (kv.of_rows(row), block_table_BGM[row], places_1GE, q_TND.dtype)
        k_GED, v_GED = read_keys(*cache)[0], read_values(*cache)[0]
        seen_GE = None if num_queries_BGE is None else num_queries_BGE[index, :, : len(entry_E)]
        for start, q in zip(range(0, len(q_ND), BLOCK), q_ND.split(BLOCK), strict=True):
            left_GE = None if seen_GE is None else seen_GE - start
            found.append(_attend_blockwise(q, k_GED, v_GED, filled_GE, left_GE))
    outputs, lses = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def _attend_blockwise(
    q_TND: Tensor, k_GED: Tensor, v_GED: Tensor, filled_GE: Tensor, num_queries_GE: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output [N, T, D] and log-sum-exp [N, T] of a few queries."""
    dtype = accumulation_dtype(q_TND.dtype)
    q_GRTD = q_TND.transpose(0, 1).unflatten(0, (len(k_GED), -1)).to(dtype)
    # Slots beyond the length of a head may hold anything; its values must not be NaN for a weight of 0.
    v_GED = v_GED.to(dtype).masked_fill(~filled_GE.unsqueeze(-1), 0.0)
    scores = torch.einsum("grtd,ged->grte", q_GRTD, k_GED.to(dtype)) * q_TND.shape[-1] ** -0.5
    seen_GTE = filled_GE.unsqueeze(1)
    if num_queries_GE is not None:
        query_T1 = torch.arange(len(q_TND), device=q_TND.device).unsqueeze(-1)
        seen_GTE = seen_GTE & (query_T1 < num_queries_GE.unsqueeze(1))
    scores = scores.masked_fill(~seen_GTE.unsqueeze(1), -torch.inf)
    lse_GRT = scores.logsumexp(-1)
    weights = torch.exp(scores - lse_GRT.nan_to_num(neginf=0.0)[..., None])
    output = torch.einsum("grte,ged->grtd", weights, v_GED)
    return output.flatten(0, 1).to(q_TND.dtype), lse_GRT.flatten(0, 1)

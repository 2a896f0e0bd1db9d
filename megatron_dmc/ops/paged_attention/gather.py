"""Attention over a paged cache in PyTorch: entries gathered through the block tables, then dense attention.

Legend: B sequences, N query heads, G KV heads, R = N / G, D head dim, P entries per block, M blocks per head cache,
E longest cache, T packed queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype

BLOCK = 128
"""Queries whose scores exist at one time."""


def paged_attention(
    q_BND: Tensor, k_blocks: Tensor, v_blocks: Tensor, block_table_BGM: Tensor, cache_seqlens_BG: Tensor
) -> Tensor:
    """Attention of one query per sequence over its own cache, whose heads have lengths of their own.

    Args:
        q_BND: rotated queries; query head n reads KV head n // (N / G). Scores are scaled by 1 / sqrt(D).
        k_blocks, v_blocks: [number of blocks, P, D] pool of rotated keys and values.
        block_table_BGM: int32 blocks of each head cache in order; entries beyond its length are never read.
        cache_seqlens_BG: int32 entries of each head cache, at least 1.

    Returns:
        [B, N, D] in the dtype of ``q_BND``.
    """
    batch, num_query_heads, head_dim = q_BND.shape
    num_kv_heads = cache_seqlens_BG.shape[1]
    longest = int(cache_seqlens_BG.max())
    entry_E = torch.arange(longest, device=q_BND.device)
    filled_BGE = entry_E < cache_seqlens_BG.unsqueeze(-1)
    # Beyond the length of a head its first entry is read again: unwritten memory could be NaN, which no mask hides.
    slot_BGE = entry_slots(block_table_BGM, torch.where(filled_BGE, entry_E, 0), k_blocks.shape[1])
    # On a CPU this reads rows three times as fast as indexing does.
    k_BGED, v_BGED = (F.embedding(slot_BGE, blocks.flatten(0, 1)) for blocks in (k_blocks, v_blocks))
    q_BGRD = q_BND.view(batch, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
    output_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGED, v_BGED, attn_mask=filled_BGE.unsqueeze(2))
    return output_BGRD.reshape(q_BND.shape)


def paged_attention_to_chunks(
    q_TND: Tensor,
    counts: Sequence[int],
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_table_BGM: Tensor,
    cache_seqlens_BG: Tensor,
) -> tuple[Tensor, Tensor]:
    """Attention of several queries per sequence, each over all of its sequence's cache.

    Args:
        q_TND: rotated queries, those of one sequence after those of another.
        counts: queries of each sequence.
        k_blocks, v_blocks, block_table_BGM, cache_seqlens_BG: as in :func:`paged_attention`; lengths may be 0.

    Returns:
        Output [N, T, D] in the dtype of ``q_TND``, and log-sum-exp of the scores [N, T], -inf over no entries.
    """
    found = []
    for index, q_ND in enumerate(q_TND.split(list(counts))):
        length_G = cache_seqlens_BG[index]
        entry_E = torch.arange(max(int(length_G.max()), 1), device=q_TND.device)
        filled_GE = entry_E < length_G.unsqueeze(-1)
        places_1GE = torch.where(filled_GE, entry_E, 0).unsqueeze(0)
        slot_GE = entry_slots(block_table_BGM[index : index + 1], places_1GE, k_blocks.shape[1])[0]
        k_GED, v_GED = (F.embedding(slot_GE, blocks.flatten(0, 1)) for blocks in (k_blocks, v_blocks))
        found += [_attend_blockwise(q, k_GED, v_GED, filled_GE) for q in q_ND.split(BLOCK)]
    outputs, lses = zip(*found, strict=True)
    return torch.cat(outputs, dim=1), torch.cat(lses, dim=1)


def _attend_blockwise(q_TND: Tensor, k_GED: Tensor, v_GED: Tensor, filled_GE: Tensor) -> tuple[Tensor, Tensor]:
    """Output [N, T, D] and log-sum-exp [N, T] of a few queries."""
    dtype = accumulation_dtype(q_TND.dtype)
    q_GRTD = q_TND.transpose(0, 1).unflatten(0, (len(k_GED), -1)).to(dtype)
    # Slots beyond the length of a head may hold anything; its values must not be NaN for a weight of 0.
    v_GED = v_GED.to(dtype).masked_fill(~filled_GE.unsqueeze(-1), 0.0)
    scores = torch.einsum("grtd,ged->grte", q_GRTD, k_GED.to(dtype)) * q_TND.shape[-1] ** -0.5
    scores = scores.masked_fill(~filled_GE[:, None, None], -torch.inf)
    lse_GRT = scores.logsumexp(-1)
    weights = torch.exp(scores - lse_GRT.nan_to_num(neginf=0.0)[..., None])
    output = torch.einsum("grte,ged->grtd", weights, v_GED)
    return output.flatten(0, 1).to(q_TND.dtype), lse_GRT.flatten(0, 1)


def entry_slots(block_table_BGM: Tensor, entry_BGE: Tensor, block_size: int) -> Tensor:
    """int64 [B, G, E]: where in the flattened pool the given entries of each head cache lie."""
    block_BGE = block_table_BGM.gather(-1, entry_BGE // block_size).long()
    return block_BGE * block_size + entry_BGE % block_size

"""Decode attention over a paged cache in PyTorch: entries gathered through the block tables, then dense attention.

Legend: B batch, N query heads, G KV heads, D head dim, P entries per block, M blocks per head cache, T longest cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    entry_T = torch.arange(longest, device=q_BND.device)
    filled_BGT = entry_T < cache_seqlens_BG.unsqueeze(-1)
    # Beyond the length of a head its first entry is read again: unwritten memory could be NaN, which no mask hides.
    slot_BGT = entry_slots(block_table_BGM, torch.where(filled_BGT, entry_T, 0), k_blocks.shape[1])
    # On a CPU this reads rows three times as fast as indexing does.
    k_BGTD, v_BGTD = (F.embedding(slot_BGT, blocks.flatten(0, 1)) for blocks in (k_blocks, v_blocks))
    q_BGJD = q_BND.view(batch, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
    output_BGJD = F.scaled_dot_product_attention(q_BGJD, k_BGTD, v_BGTD, attn_mask=filled_BGT.unsqueeze(2))
    return output_BGJD.reshape(q_BND.shape)


def entry_slots(block_table_BGM: Tensor, entry_BGT: Tensor, block_size: int) -> Tensor:
    """int64 [B, G, T]: where in the flattened pool the given entries of each head cache lie."""
    block_BGT = block_table_BGM.gather(2, entry_BGT // block_size).long()
    return block_BGT * block_size + entry_BGT % block_size

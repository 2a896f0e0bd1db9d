"""Decode attention over a paged cache, one head at a time: the plain form.

Legend: B batch, N query heads, G KV heads, D head dim, P entries per block, M blocks per head cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def paged_attention(
    q_BND: Tensor, k_blocks: Tensor, v_blocks: Tensor, block_table_BGM: Tensor, cache_seqlens_BG: Tensor
) -> Tensor:
    """Attention of one query per sequence over its own cache; see :func:`megatron_dmc.ops.paged_attention`."""
    batch, num_query_heads, head_dim = q_BND.shape
    num_kv_heads = block_table_BGM.shape[1]
    output_BND = torch.empty_like(q_BND, dtype=torch.float32)
    for sequence in range(batch):
        for query_head in range(num_query_heads):
            kv_head = query_head // (num_query_heads // num_kv_heads)
            length = int(cache_seqlens_BG[sequence, kv_head])
            blocks = block_table_BGM[sequence, kv_head].long()
            k_TD = k_blocks[blocks].flatten(0, 1)[:length].float()
            v_TD = v_blocks[blocks].flatten(0, 1)[:length].float()
            scores_T = k_TD @ q_BND[sequence, query_head].float() / head_dim**0.5
            output_BND[sequence, query_head] = scores_T.softmax(dim=0) @ v_TD
    return output_BND.to(q_BND.dtype)

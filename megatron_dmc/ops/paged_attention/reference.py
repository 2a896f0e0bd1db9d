"""Decode attention over a paged cache, one head at a time: the plain form.

Legend: B batch, N query heads, G KV heads, R = N / G, D head dim, E entries, P entries per block, M blocks per head
cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.kv_quantization import reference
from megatron_dmc.ops.paged_kv import PagedKV


def paged_attention(q_BND: Tensor, kv: PagedKV, block_table_BGM: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
    """Attention of one query per sequence over its own cache; see :func:`megatron_dmc.ops.paged_attention`."""
    return attend(q_BND, kv, block_table_BGM, cache_seqlens_BG)[0]


def attend(
    q_BND: Tensor, kv: PagedKV, block_table_BGM: Tensor, cache_seqlens_BG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [B, N, D], log-sum-exp of the scores [B, N] and weights [B, G, R, E], over at most E = M P entries.

    A head cache without entries gives zeros, with -inf for log-sum-exp.
    """
    batch, num_query_heads, head_dim = q_BND.shape
    num_kv_heads = block_table_BGM.shape[1]
    output_BND = torch.zeros(q_BND.shape)
    lse_BN = torch.full((batch, num_query_heads), -torch.inf)
    weights_BNE = torch.zeros(batch, num_query_heads, block_table_BGM.shape[2] * kv.block_size)
    for sequence in range(batch):
        for query_head in range(num_query_heads):
            kv_head = query_head // (num_query_heads // num_kv_heads)
            entries = read_entries(kv, block_table_BGM, cache_seqlens_BG, sequence, kv_head)
            if not entries:
                continue
            k_ED, v_ED = (torch.stack(x) for x in zip(*entries, strict=True))
            scores_E = k_ED @ q_BND[sequence, query_head].float() / head_dim**0.5
            output_BND[sequence, query_head] = scores_E.softmax(dim=0) @ v_ED
            lse_BN[sequence, query_head] = scores_E.logsumexp(dim=0)
            weights_BNE[sequence, query_head, : len(entries)] = scores_E.softmax(dim=0)
    return output_BND.to(q_BND.dtype), lse_BN, weights_BNE.unflatten(1, (num_kv_heads, -1))


def read_entries(
    kv: PagedKV, block_table_BGM: Tensor, cache_seqlens_BG: Tensor, sequence: int, kv_head: int
) -> list[tuple[Tensor, Tensor]]:
    """Key and value of every entry of a head cache, float32 [D] each."""
    entries = []
    for entry in range(int(cache_seqlens_BG[sequence, kv_head])):
        block = int(block_table_BGM[sequence, kv_head, entry // kv.block_size])
        place = (block, entry % kv.block_size)
        if kv.open_entry_BG is not None and entry == int(kv.open_entry_BG[sequence, kv_head]):
            assert kv.k_open is not None
            assert kv.v_open is not None
            entries.append((kv.k_open[sequence, kv_head].float(), kv.v_open[sequence, kv_head].float()))
        elif kv.k_scale is not None and kv.v_scale is not None:
            k_D = reference.dequantise(kv.k_blocks[place], float(kv.k_scale[place]))
            entries.append((k_D, reference.dequantise(kv.v_blocks[place], float(kv.v_scale[place]))))
        else:
            entries.append((kv.k_blocks[place].float(), kv.v_blocks[place].float()))
    return entries

"""One layer of attention through the paged cache: some positions in one pass, the others step by step.

Shapes: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import (
    AttentionSettings,
    DecodeAttention,
    FullSequenceAttention,
    PrefillAttention,
)
from megatron_dmc.models.config import ModelConfig


def paged_decode(
    q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, dmc: DMCConfig, rope_theta: float, prefill_length: int = 0
) -> tuple[Tensor, Tensor]:
    """Attention output [S, B, N, D], and cache lengths [S, B, G] after each position (-1 inside the first pass)."""
    length, batch, num_kv_heads, head_dim = k_SBGD.shape
    config = ModelConfig(
        hidden_size=head_dim,
        num_layers=1,
        num_attention_heads=q_SBND.shape[2],
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=head_dim,
        vocab_size=1,
        max_position_embeddings=length,
        rope_theta=rope_theta,
    )
    settings = AttentionSettings(config, dmc, q_SBND.device)
    cache = PagedKVCache(CacheShape(1, num_kv_heads, head_dim, q_SBND.dtype, dmc.window_size, block_size=4), batch)
    rows_B = cache.add_sequences(batch)
    output = torch.empty_like(q_SBND)
    lengths = torch.full(k_SBGD.shape[:-1], -1, dtype=torch.int32)
    if prefill_length:
        whole = FullSequenceAttention(settings, prefill_length)
        attend = PrefillAttention(whole, cache, rows_B, torch.full((batch,), prefill_length))
        output[:prefill_length] = attend(0, *(x[:prefill_length] for x in (q_SBND, k_SBGD, v_SBGD)))
        lengths[prefill_length - 1] = cache.cache_seqlens[0, rows_B]
    for t in range(prefill_length, length):
        cache.num_tokens[rows_B] = t
        output[t] = DecodeAttention(settings, cache, rows_B)(0, *(x[t : t + 1] for x in (q_SBND, k_SBGD, v_SBGD)))[0]
        lengths[t] = cache.cache_seqlens[0, rows_B]
    return output, lengths

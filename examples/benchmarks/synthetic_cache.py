"""Caches of a given compression ratio without a text: random entries, as many as asked in every head cache.

Legend: L layers, B sequences, G KV heads, T entries of the longest head cache, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import PagedKVCache
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.methods.base import Update
from megatron_dmc.methods.step import Step


def head_lengths(heads: tuple[int, int, int], context: int, ratio: float, spread: float, seed: int = 0) -> Tensor:
    """int64 [L, B, G] entries of each head cache, ``context`` / ``ratio`` on average.

    ``spread`` is the standard deviation of their logarithm: 0 makes all of them equal.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_LBG = torch.exp(spread * torch.randn(heads, generator=generator))
    return (weight_LBG * (context / ratio / weight_LBG.mean())).round().long().clamp(1, context)


def fill(cache: PagedKVCache, length_LBG: Tensor) -> None:
    """Write random entries of variance 1 into the first B rows of an empty cache."""
    shape, device = cache.shape, cache.device
    _, batch, num_heads = length_LBG.shape
    rows = list(range(batch))
    longest = int(length_LBG.max())
    step = Step(rows, [0] * batch, [longest] * batch, torch.ones(shape.head_dim // 2, device=device))
    cache.reserve(rows, step.counts)
    place_TG = step.offset_T.unsqueeze(-1).expand(-1, num_heads)
    for layer, length_BG in enumerate(length_LBG.to(device)):
        # The newest token of a sequence always writes: what a head cache lacks, it lacks in front.
        entry_TG = (place_TG - (longest - length_BG[step.sequence_T])).clamp(min=-1).int()
        k_TGD, v_TGD = torch.randn(2, len(entry_TG), num_heads, shape.head_dim, device=device).to(shape.dtype)
        cache.write(layer, step, Update(k_TGD, v_TGD, entry_TG, {}))
    cache.commit(step)


def bytes_per_step(model: Decoder, cache: PagedKVCache) -> tuple[int, int]:
    """Bytes of weights and of entries that a step of decoding reads at least."""
    config = model.config
    heads = config.num_attention_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_attention_heads)
    layer = attention + 3 * config.hidden_size * config.ffn_hidden_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    entries = 2 * int(cache.cache_seqlens.sum()) * config.head_dim
    return weights * model.dtype.itemsize, entries * cache.shape.dtype.itemsize


def waste(cache: PagedKVCache) -> float:
    """Places in blocks that hold nothing, as a share of the entries."""
    entries = int(cache.cache_seqlens.sum())
    return int(cache.held_blocks.sum()) * cache.shape.block_size / entries - 1

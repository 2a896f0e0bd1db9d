"""One layer of attention through the paged cache, its tokens in passes of any lengths.

Shapes: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import CachedAttention
from megatron_dmc.methods import Method
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.rope import inverse_frequencies


def paged_decode(
    q_SBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    method: Method,
    rope_theta: float,
    passes: Sequence[int] = (),
    adapter_SBG: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output [S, B, N, D], and cache lengths [S, B, G] after each position (-1 inside a pass).

    ``passes``: numbers of tokens that are read at once, from the start; the others follow one by one.
    """
    length, batch, num_kv_heads, head_dim = k_SBGD.shape
    shape = CacheShape(1, num_kv_heads, head_dim, q_SBND.dtype, method.state(head_dim), block_size=4)
    cache = PagedKVCache(shape, batch)
    rows = cache.add_sequences(batch)
    frequencies = inverse_frequencies(head_dim, rope_theta)
    output = torch.empty_like(q_SBND)
    lengths = torch.full(k_SBGD.shape[:-1], -1, dtype=torch.int32)
    start = 0
    for count in [*passes, *[1] * (length - sum(passes))]:
        cache.reserve(rows, [count] * batch)
        step = Step(rows, [start] * batch, [count] * batch, frequencies)
        inputs = (q_SBND, k_SBGD, v_SBGD) if adapter_SBG is None else (q_SBND, k_SBGD, v_SBGD, adapter_SBG)
        packed = (x[start : start + count].transpose(0, 1).flatten(0, 1) for x in inputs)
        found = CachedAttention(method, cache, step)(0, *packed)
        cache.commit(step)
        output[start : start + count] = found.unflatten(0, (batch, count)).transpose(0, 1)
        start += count
        lengths[start - 1] = cache.cache_seqlens[0]
    cache.check_integrity()
    return output, lengths

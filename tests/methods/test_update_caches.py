"""Decoding in place (``ops.cache_update.update_caches``) does what a method and the cache do between them.

Legend: B sequences, N query heads, G KV heads, D head dim.
"""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.methods import DMC, Dense
from megatron_dmc.methods.dmc import SEGMENT
from megatron_dmc.methods.step import Step, Tokens
from megatron_dmc.ops.cache_update import HeadCaches, NewTokens, update_caches
from megatron_dmc.ops.paged_attention.reference import read_entries
from megatron_dmc.ops.rope import inverse_frequencies

B, N, G, D = 2, 4, 2, 16
METHODS = {
    "dense": Dense(),
    "zero_out": Dense(neuron_scale=0.4),
    "dmc": DMC(DMCConfig(decision_bias=0.3)),
    "dmc, window": DMC(DMCConfig(decision_bias=0.3, window_size=3, decision_threshold=0.1)),
    "dmc, per layer": DMC(DMCConfig(decision_bias=0.3, decisions_per="layer")),
}


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_method_and_the_cache(name):
    method, layer = METHODS[name], 1
    assert method.updates_in_place
    shape = CacheShape(2, G, D, torch.float32, method.state(D), block_size=4)
    one, other = PagedKVCache(shape, 3), PagedKVCache(shape, 3)
    rows = [2, 0]
    for cache in (one, other):
        assert sorted(cache.add_sequences(3)) == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    for position in range(11):
        step = Step(rows, [position, 3 * position], [1, 1], inverse_frequencies(D, 10000.0))
        tokens = Tokens(*(torch.randn(B, heads, D, generator=generator) for heads in (N, G, G)), step)
        for cache in (one, other):
            cache.reserve(rows, [1, 1])
        update = method.absorb(tokens, *one.before(layer, step))
        one.write(layer, step, update)
        one.set_state(layer, step, update.state)

        caches = HeadCaches(
            other.pool.kv,
            other.block_table[layer],
            other.cache_seqlens[layer],
            other.state[SEGMENT][layer] if SEGMENT in other.state else None,
        )
        cos_BC, sin_BC = step.geometry.cos_sin_S
        q_BND, accumulate_BG = update_caches(
            NewTokens(*tokens[:3], step.position_T, cos_BC, sin_BC),
            caches,
            step.rows_B,
            merging=method.merging,
            logits=method.shared_logits(*tokens[:2]),
            neuron_scale=method.neuron_scale,
        )
        for cache in (one, other):
            cache.commit(step)
        torch.testing.assert_close(q_BND, method.rotated_queries(tokens))
        if update.decisions is not None:
            assert torch.equal(accumulate_BG, update.decisions.of_heads(G).hard)
        assert_same(one, other, layer)


def assert_same(one, other, layer):
    assert torch.equal(one.cache_seqlens[layer], other.cache_seqlens[layer])
    for name in one.state:
        torch.testing.assert_close(one.state[name][layer], other.state[name][layer])
    for row in (0, 2):
        for head in range(G):
            entries = [
                read_entries(
                    cache.pool.kv,
                    cache.block_table[layer],
                    cache.cache_seqlens[layer],
                    row,
                    head,
                )
                for cache in (one, other)
            ]
            torch.testing.assert_close(*entries)

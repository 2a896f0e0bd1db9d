"""Decoding in place against decoding through method and cache: the same model, sequences of different ages."""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.in_place import InPlaceAttention
from megatron_dmc.methods import TOVA
from megatron_dmc.ops.cache_update import HeadCaches
from tests.inference.tiny_model import tiny_model

SETTINGS = {
    "dense": None,
    "zero_out": DMCConfig(stage="zero_out"),
    "dmc": DMCConfig(decision_bias=-1.0),
    "dmc, window": DMCConfig(decision_bias=-1.0, window_size=3),
    "dmc, per layer": DMCConfig(decision_bias=-1.0, decisions_per="layer"),
}


def layers_of(cache):
    state = next(iter(cache.state.values()), [None] * len(cache.cache_seqlens))
    by_layer = zip(cache.block_table, cache.cache_seqlens, state, strict=True)
    return [HeadCaches(cache.pool.kv, *of_layer) for of_layer in by_layer]


@pytest.mark.parametrize("name", SETTINGS)
def test_equals_decoding_through_method_and_cache(name):
    model = tiny_model(SETTINGS[name])
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [5, 3]]
    caches, found = [], []
    for in_place in (False, True):
        cache = model.new_cache(3, block_size=4)
        rows = cache.add_sequences(3)[:0:-1]
        for row, prompt in zip(rows, prompts, strict=True):
            model.read(torch.tensor(prompt), [len(prompt)], cache, [row])
        for step in range(6):
            token_B = torch.tensor([7 + step, 11 + 2 * step])
            if in_place:
                positions = [cache.num_tokens[row] for row in rows]
                cache.reserve(rows, [1, 1])
                attention = InPlaceAttention(
                    model.method,
                    layers_of(cache),
                    cache.cache_seqlens,
                    torch.tensor(rows),
                    torch.tensor(positions),
                    model.inverse_frequencies,
                )
                hidden = model.step(token_B, attention)
                for row in rows:
                    cache.num_tokens[row] += 1
            else:
                hidden = model.read(token_B, [1, 1], cache, rows)
            found.append(hidden)
        cache.check_integrity()
        caches.append(cache)
    torch.testing.assert_close(torch.stack(found[6:]), torch.stack(found[:6]), atol=1e-5, rtol=1e-5)
    assert torch.equal(caches[0].cache_seqlens, caches[1].cache_seqlens)
    if model.method.compresses:
        assert caches[0].cache_seqlens.sum() < 2 * 2 * (8 + 2 + 12)


def test_a_policy_that_looks_at_attention_cannot_decode_in_place():
    with pytest.raises(AssertionError, match="tova needs more"):
        InPlaceAttention(TOVA(4), [], torch.zeros(1, 1, 1), torch.zeros(1), torch.zeros(1), torch.zeros(1))

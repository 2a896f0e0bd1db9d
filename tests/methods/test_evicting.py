"""H2O and TOVA against their definitions, written as loops over steps with whole softmax matrices.

1. One layer's tokens by hand: what is kept, and attention over it; 2. the policy through the paged cache.

Legend: S sequence, N query heads, G KV heads, D head dim.
"""

import pytest
import torch

from megatron_dmc import methods
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.decoder.layer_attention import CachedAttention
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.rope import apply_rope, cos_sin, inverse_frequencies
from tests.inference.tiny_model import RandomSource, tiny_llama

S, N, G, D = 50, 4, 2, 16
FREQUENCIES = inverse_frequencies(D, 10000.0)


def projections(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(S, N, D, generator=generator)
    k, v = 2 * torch.randn(2, S, G, D, generator=generator)
    return q, k, v


def weights_over(q_ND, k_SGD, kept):
    """Softmax weights [N, E] of one rotated query over the tokens ``kept`` of each head, a list per KV head."""
    rows = [q_ND[n] @ k_SGD[kept[n // (N // G)], n // (N // G)].T / D**0.5 for n in range(N)]
    return torch.stack(rows).softmax(-1)


class LoopH2O:
    """Sets, scores and recent window of each head, as the paper describes them."""

    def __init__(self, budget):
        self.budget, self.recent = budget, budget // 2
        self.kept = [[] for _ in range(G)]
        self.score = [{} for _ in range(G)]

    def step(self, position, weights_of):
        for g in range(G):
            self.kept[g].append(position)
            self.score[g][position] = 0.0
        weights = weights_of(self.kept)
        for g in range(G):
            for place, token in enumerate(self.kept[g]):
                self.score[g][token] += weights[g * N // G : (g + 1) * N // G, place].sum().item()
        return [list(kept) for kept in self.kept], weights

    def evict(self, position):
        for g in range(G):
            while len(self.kept[g]) > self.budget:
                old = [token for token in self.kept[g] if token <= position - self.recent]
                self.kept[g].remove(min(old, key=self.score[g].get))


class LoopTOVA(LoopH2O):
    """One set for all heads, by the newest query alone."""

    def step(self, position, weights_of):
        kept, weights = super().step(position, weights_of)
        self.newest = dict(zip(self.kept[0], weights.mean(0).tolist(), strict=True))
        return kept, weights

    def evict(self, position):
        while len(self.kept[0]) > self.budget:
            victim = min(self.kept[0], key=self.newest.get)
            for g in range(G):
                self.kept[g].remove(victim)


LOOPS = {"h2o": LoopH2O, "tova": LoopTOVA}


def by_hand(name, budget, prompt, q, k, v):
    """Attention output [S, N, D] of every position; the prompt is read densely and then cut."""
    cos, sin = (x[:, None] for x in cos_sin(torch.arange(S), FREQUENCIES))
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    loop, outputs = LOOPS[name](budget), []
    for position in range(S):
        kept, weights = loop.step(position, lambda kept, at=position: weights_over(q[at], k, kept))
        heads = [weights[n] @ v[kept[n // (N // G)], n // (N // G)] for n in range(N)]
        outputs.append(torch.stack(heads))
        if position >= prompt - 1:
            loop.evict(position)
    return torch.stack(outputs)


@pytest.mark.parametrize("prompt", [1, 7, 30])
@pytest.mark.parametrize("budget", [2, 9, 16])
@pytest.mark.parametrize("name", LOOPS)
def test_it_is_its_definition(name, budget, prompt):
    q, k, v = projections(seed=budget)
    method = methods.policy(name, budget)
    cache = PagedKVCache(CacheShape(1, G, D, torch.float32, method.state(D), block_size=4), 1)
    rows = cache.add_sequences(1)
    found, start = [], 0
    for count in [prompt, *[1] * (S - prompt)]:
        cache.reserve(rows, [count])
        step = Step(rows, [start], [count], FREQUENCIES)
        found.append(CachedAttention(method, cache, step)(0, *(x[start : start + count] for x in (q, k, v))))
        cache.commit(step)
        start += count
        assert int(cache.cache_seqlens.max()) <= (max(budget, 1) if count > 1 else budget + 1)
    torch.testing.assert_close(torch.cat(found), by_hand(name, budget, prompt, q, k, v), atol=1e-5, rtol=0)
    cache.check_integrity()


@pytest.mark.parametrize("name", LOOPS)
def test_texts_do_not_depend_on_the_batch(name):
    model = Decoder(RandomSource(tiny_llama()), method=methods.policy(name, 10))
    prompts = [list(range(30)), [3, 1, 4], [27], list(range(12))]
    sampling = SamplingParams(max_new_tokens=20)
    alone = [Engine(model, block_size=3).generate([prompt], sampling)[0].output for prompt in prompts]
    together = Engine(model, prefill_tokens=16).generate(prompts, sampling)
    assert [request.output for request in together] == alone
    assert {max(map(max, request.usage.entries)) for request in together} == {11}


@pytest.mark.parametrize("name", LOOPS)
def test_a_budget_that_is_never_reached_changes_nothing(name):
    source = RandomSource(tiny_llama())
    prompts, sampling = [[3, 1, 4, 1, 5], [9]], SamplingParams(max_new_tokens=15)
    dense = Engine(Decoder(source)).generate(prompts, sampling)
    kept = Engine(Decoder(source, method=methods.policy(name, 64))).generate(prompts, sampling)
    assert [request.output for request in kept] == [request.output for request in dense]


@pytest.mark.parametrize("name", LOOPS)
def test_mistakes_are_named(name):
    with pytest.raises(ValueError, match=f"budget=1: {name} keeps at least 2 entries"):
        methods.policy(name, 1)
    model = Decoder(RandomSource(tiny_llama()), method=methods.policy(name, 8))
    cache = model.new_cache(1)
    rows = cache.add_sequences(1)
    model.read(torch.arange(5), [5], cache, rows)
    with pytest.raises(ValueError, match=f"{name} reads a prompt whole"):
        model.read(torch.arange(3), [3], cache, rows)
    with pytest.raises(ValueError, match="has no whole form"):
        model.forward(torch.zeros(4, 1, dtype=torch.int64))

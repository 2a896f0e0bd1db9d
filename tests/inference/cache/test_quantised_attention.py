"""Attention over a cache of 8 bits, for every method, beside lists of entries.

One rule says what a token sees: an entry is read as it is in the pass that wrote it, and quantised in later ones.

Legend: T new tokens, N query heads, G KV heads, D head dim.
"""

import pytest
import torch

from megatron_dmc import methods
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import CachedAttention
from megatron_dmc.methods import DMC, Dense
from megatron_dmc.methods.step import Step, Tokens
from megatron_dmc.ops.kv_quantization import dequantise, find_kv_format, quantise
from megatron_dmc.ops.rope import inverse_frequencies

N, G, D = 4, 2, 16
PARTS = [(7, 5), (1, 1), (1, 1), (4, 1), (1, 1), (1, 9), (3, 3), *[(1, 1)] * 9]
WHOLE_PROMPTS = [(13, 6), *[(1, 1)] * 20]
CASES = {
    "dense": (Dense(), PARTS),
    "dmc": (DMC(DMCConfig(decision_bias=0.3)), PARTS),
    "dmc, window": (DMC(DMCConfig(decision_bias=0.3, window_size=3)), PARTS),
    "dmc, per layer": (DMC(DMCConfig(decision_bias=0.3, decisions_per="layer")), PARTS),
    "h2o": (methods.policy("h2o", 8), WHOLE_PROMPTS),
    "tova": (methods.policy("tova", 8), WHOLE_PROMPTS),
    "prompts of one token": (methods.policy("tova", 4), [(1, 1)] * 20),
}


class Lists:
    """Entries by (sequence, head) and place: key, value and the pass that wrote them."""

    def __init__(self, kv_dtype):
        self.kv_format = find_kv_format(kv_dtype)
        self.entries = {(sequence, head): {} for sequence in range(2) for head in range(G)}
        self.num_passes = 0

    def read(self, method, tokens, update, length_BG):
        """Attention output [T, N, D] of the tokens of a pass, each after it was written."""
        self.num_passes += 1
        q_TND, outputs = method.rotated_queries(tokens), []
        places_TG = places(update, tokens.step, length_BG)
        for token, sequence in enumerate(tokens.step.sequence_T.tolist()):
            for head in range(G):
                entry = (update.k_TGD[token, head], update.v_TGD[token, head], self.num_passes)
                self.entries[sequence, head][int(places_TG[token, head])] = entry
            outputs += [self.attend(q_TND[token, n], self.entries[sequence, n // (N // G)]) for n in range(N)]
        return torch.stack(outputs).view_as(q_TND)

    def attend(self, q_D, entries):
        seen = [
            [x if written == self.num_passes else self.closed(x) for x in pair] for *pair, written in entries.values()
        ]
        k_ED, v_ED = (torch.stack(part) for part in zip(*seen, strict=True))
        return (k_ED @ q_D / D**0.5).softmax(0) @ v_ED

    def closed(self, x_D):
        return dequantise(*quantise(x_D, self.kv_format), x_D.dtype)

    def compact(self, keep):
        for (sequence, head), entries in self.entries.items():
            kept = keep.entry_BGE[sequence, head, : keep.length_BG[sequence, head]].tolist()
            self.entries[sequence, head] = {place: entries[entry] for place, entry in enumerate(kept)}


def places(update, step, length_BG):
    """int [T, G]: the place of every token's entry, of those too that a later token of the pass overwrites."""
    if update.decisions is None:
        return update.entry_TG
    appends_TG = ~update.decisions.of_heads(G).hard
    found = []
    for sequence, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
        found.append(length_BG[sequence] + appends_TG[start : start + count].cumsum(0) - 1)
    return torch.cat(found)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("name", CASES)
def test_entries_are_quantised_after_the_pass_that_wrote_them(name, kv_dtype, monkeypatch):
    method, parts = CASES[name]
    lists = Lists(kv_dtype)
    shape = CacheShape(1, G, D, torch.float32, method.state(D), block_size=4, kv_format=lists.kv_format)
    cache = PagedKVCache(shape, 2)
    rows, generator = cache.add_sequences(2), torch.Generator().manual_seed(0)
    compact = cache.compact
    monkeypatch.setattr(cache, "compact", lambda layer, step, keep: (lists.compact(keep), compact(layer, step, keep)))
    for counts in parts:
        step = Step(rows, [cache.num_tokens[row] for row in rows], counts, inverse_frequencies(D, 10000.0))
        q, k, v = (torch.randn(sum(counts), heads, D, generator=generator) for heads in (N, G, G))
        cache.reserve(rows, counts)
        tokens, before = Tokens(q, k, v, step), cache.before(0, step)
        expected = lists.read(method, tokens, method.absorb(tokens, *before), before[1].clone())
        found = CachedAttention(method, cache, step)(0, q, k, v)
        cache.commit(step)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        cache.check_integrity()
        lengths = {key: len(entries) for key, entries in lists.entries.items()}
        assert cache.cache_seqlens[0, rows].flatten().tolist() == list(lengths.values())

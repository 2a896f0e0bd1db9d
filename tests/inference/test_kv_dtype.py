"""Models with caches of 8 bits: what the cut of a text changes and what it does not, the engine, and what is saved."""

import pytest
import torch

from megatron_dmc import methods
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.memory_need import ModelMemory
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.ops.kv_quantization import find_kv_format
from tests.inference.tiny_model import RandomSource, tiny_llama, tiny_model

S = 48
CUTS = [[S], [16] * 3, [7, 1, 1, 20, 1, 1, 17], [1] * S]
SETTINGS = {
    "dense": None,
    "dmc": DMCConfig(decision_bias=0.0),
    "dmc, window": DMCConfig(decision_bias=0.0, window_size=3),
    "dmc, per layer": DMCConfig(decision_bias=0.0, decisions_per="layer"),
    "dms": DMCConfig("dms", decision_bias=0.0, window_size=5),
    "dms, no window": DMCConfig("dms", decision_bias=-0.2, window_size=0, decided_by="next"),
}
"""Their decision logits on the text keep clear of 0: a decision that falls otherwise leads to another text."""
MEAN_KL = {"int8": 2.5e-4, "fp8": 5e-3}
"""Nats; three times the largest seen: 8e-5 and 1.5e-3."""
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]


def log_probs(model, counts, kv_dtype):
    """[S, V] of a random text that is read in parts."""
    token_S = torch.randint(model.config.vocab_size, (S,), generator=torch.Generator().manual_seed(0))
    cache = model.new_cache(1, kv_dtype=kv_dtype, block_size=4)
    rows = cache.add_sequences(1)
    parts = [model.logits(model.read(part, [len(part)], cache, rows)).log_softmax(-1) for part in token_S.split(counts)]
    cache.check_integrity()
    return torch.cat(parts)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("name", SETTINGS)
def test_cuts_of_a_text_agree_nearly_and_the_same_cut_to_the_bit(name, kv_dtype):
    model = tiny_model(SETTINGS[name])
    expected = log_probs(model, CUTS[-1], "auto")
    for counts in CUTS:
        found = log_probs(model, counts, kv_dtype)
        assert torch.equal(found, log_probs(model, counts, kv_dtype))
        kl_S = (expected.exp() * (expected - found)).sum(-1)
        assert kl_S.mean() < MEAN_KL[kv_dtype]
        assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.85
        if len(counts) > 1:
            assert kl_S.max() > 1e-6, "nothing was quantised"


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_a_full_cache_loses_no_request(kv_dtype):
    """Requests that were preempted are read again in other parts: their texts need not be the same."""
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=25)
    full = Engine(model, num_blocks=60, block_size=3, max_sequences=4, kv_dtype=kv_dtype)
    full.expectation.num_heads, full.expectation.growth = 0, lambda request: 0
    preempted, give_back = [], full.scheduler.give_back
    full.scheduler.give_back = lambda requests: (preempted.extend(requests), give_back(requests))
    for request in full.generate(PROMPTS, sampling):
        assert request.finish_reason == "length"
        assert len(request.output) == 25
    assert preempted
    full.runner.cache.check_integrity()
    assert full.runner.cache.blocks.num_in_use == full.runner.cache.rows.num_in_use == 0


@pytest.mark.parametrize("method", [None, methods.policy("h2o", 10), methods.policy("tova", 10)])
def test_texts_do_not_depend_on_the_batch(method):
    """Each prompt is read whole here and there, and then token by token."""
    model = Decoder(RandomSource(tiny_llama()), method=method)
    sampling = SamplingParams(max_new_tokens=12)
    alone = [Engine(model, kv_dtype="int8").generate([prompt], sampling)[0].output for prompt in PROMPTS]
    together = Engine(model, kv_dtype="int8", block_size=3)
    assert [request.output for request in together.generate(PROMPTS, sampling)] == alone
    together.runner.cache.check_integrity()


def test_samples_of_a_prompt_go_on_from_its_open_entries():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=7)
    samples = Engine(model, block_size=4, kv_dtype="int8").generate(PROMPTS[3:], sampling, n=2)
    (alone,) = Engine(model, block_size=4, kv_dtype="int8").generate(PROMPTS[3:], sampling)
    assert samples[0].output == alone.output
    assert samples[0].usage == alone.usage


def test_memory_is_planned_for_8_bits():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    cache = model.new_cache(3, kv_dtype="int8", block_size=32, num_blocks=10)
    kv, state = cache.pool.kv, sum(tensor.nbytes for tensor in cache.state.values())
    memory = ModelMemory(model.config, model.dtype, model.method, 32, find_kv_format("int8"))
    assert memory.pool(10, 3) == sum(tensor.nbytes for tensor in kv) + state


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match=r"kv_dtype='int4': must be one of auto, fp8, int8"):
        Engine(tiny_model(), kv_dtype="int4")

"""Models that evict: decoding against whole forward passes, the engine, and what is refused."""

import dataclasses
import itertools

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.perplexity import evaluate
from megatron_dmc.evaluation.scores import score_decode, score_whole
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.memory_need import ModelMemory
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from tests.inference.test_engine import PROMPTS, assert_empty, finish, hopeful
from tests.inference.test_train_equals_decode import (
    HEADS,
    LENGTH,
    TOLERANCE,
    decoded_log_probs,
    random_tokens,
    whole_log_probs,
)
from tests.inference.tiny_model import RandomSource, tiny_llama, tiny_model


def settings_of(window_size=5, decided_by="own", decision_source="neuron", **others) -> DMCConfig:
    """About half of the tokens are marked."""
    return DMCConfig(
        "dms",
        window_size=window_size,
        decided_by=decided_by,
        decision_source=decision_source,
        decision_bias=0.0,
        **others,
    )


SETTINGS = {
    f"{decided_by}, {decision_source}": settings_of(decided_by=decided_by, decision_source=decision_source)
    for decided_by, decision_source in itertools.product(("own", "next"), ("neuron", "adapter"))
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window_size", [0, 1, 16])
@pytest.mark.parametrize("name", SETTINGS)
def test_whole_model(name, window_size, heads):
    settings = dataclasses.replace(SETTINGS[name], window_size=window_size)
    model = tiny_model(settings, num_attention_heads=HEADS[heads][0], num_kv_heads=HEADS[heads][1])
    token_SB = random_tokens(3)
    expected, trace = whole_log_probs(model, token_SB)
    assert 0.2 < torch.stack(trace.alpha).float().mean() < 0.8
    decoded, _, _ = decoded_log_probs(model, token_SB, [23, 1, 60])
    torch.testing.assert_close(decoded, expected, **TOLERANCE)


@pytest.mark.parametrize("chunk", [1, 7, 33])
@pytest.mark.parametrize("name", SETTINGS)
def test_prompts_may_be_read_in_any_parts(name, chunk):
    model = tiny_model(SETTINGS[name])
    token_SB = random_tokens(3)
    expected, _ = whole_log_probs(model, token_SB)
    decoded, cache, rows = decoded_log_probs(model, token_SB, [41, 3, 60], chunk=chunk)
    torch.testing.assert_close(decoded, expected, **TOLERANCE)
    _, one_by_one, others = decoded_log_probs(model, token_SB, [1, 1, 1])
    assert torch.equal(cache.cache_seqlens[:, rows], one_by_one.cache_seqlens[:, others])


@pytest.mark.parametrize("decided_by", ["own", "next"])
@pytest.mark.parametrize("window_size", [0, 5, 16, 100])
def test_both_paths_of_an_evaluation_count_the_same_entries(window_size, decided_by):
    """From the decisions, and in the cache; after every token."""
    model = tiny_model(settings_of(window_size, decided_by))
    token_TB = random_tokens(2)
    whole, decoded = score_whole(model, token_TB), score_decode(model, token_TB)
    assert torch.equal(whole.entries_S, decoded.entries_S)
    assert torch.equal(whole.entries_LG, decoded.entries_LG)
    assert evaluate(model, token_TB.T).agreement.failures() == []
    if window_size < 16:
        assert whole.entries_S[-1] < 0.75 * decoded.entries_LG.numel() * 2 * (LENGTH - 1)


@pytest.mark.parametrize("name", SETTINGS)
def test_texts_depend_neither_on_the_batch_nor_on_parts_of_prompts(name):
    model = tiny_model(SETTINGS[name])
    sampling = SamplingParams(max_new_tokens=25)
    alone = [Engine(model).generate([prompt], sampling)[0] for prompt in PROMPTS]
    for options in ({}, {"max_sequences": 2, "block_size": 3}, {"prefill_tokens": 7}):
        engine = Engine(model, **options)
        for one, other in zip(alone, engine.generate(PROMPTS, sampling), strict=True):
            assert one.output == other.output
            assert one.usage.entries == other.usage.entries
        assert_empty(engine)
    assert alone[3].usage.compression_ratio > 1.3


def test_sixteen_texts_at_once():
    model, sampling = tiny_model(SETTINGS["next, adapter"]), SamplingParams(max_new_tokens=12, temperature=1.0)
    prompts = [[7 * n % 50, n, 3] * (1 + n % 5) for n in range(16)]
    engine = Engine(model, block_size=4)
    together = engine.generate(prompts, sampling)
    alone = [Engine(model).generate([prompt], sampling)[0].output for prompt in prompts]
    assert [request.output for request in together] == alone
    assert_empty(engine)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_full_cache_loses_no_request_and_changes_no_text(name):
    """What is preempted is read again, and comes to the same cache."""
    model = tiny_model(SETTINGS[name])
    sampling = SamplingParams(max_new_tokens=25, temperature=1.0, seed=5)
    free = Engine(model).generate(PROMPTS, sampling)
    full = Engine(model, num_blocks=75, block_size=3, max_sequences=4)
    preempted = hopeful(full)
    crowded = full.generate(PROMPTS, sampling)
    assert [request.output for request in crowded] == [request.output for request in free]
    assert preempted
    assert_empty(full)


@pytest.mark.parametrize("num_blocks", [None, 120])
def test_samples_of_a_prompt_are_those_of_requests_alone(num_blocks):
    model = tiny_model(SETTINGS["next, neuron"])
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=7)
    engine = Engine(model, block_size=4, num_blocks=num_blocks)
    for place, request in enumerate(engine.generate(PROMPTS, sampling, n=3)):
        own = dataclasses.replace(sampling, seed=7 + place % 3)
        (alone,) = Engine(model, block_size=4).generate([PROMPTS[place // 3]], own)
        assert request.output == alone.output
        assert request.usage.entries == alone.usage.entries
    assert_empty(engine)


def test_a_conversation_goes_on_from_its_entries():
    """They stand in any order by then."""
    model, sampling = tiny_model(SETTINGS["own, neuron"]), SamplingParams(max_new_tokens=20)
    engine, last, text = Engine(model, block_size=4), None, list(PROMPTS[0])
    for more in ([1, 2, 3, 4, 5, 6, 7], [9], list(range(20))):
        last = Request(list(text), sampling, keep=True, follows=last)
        finish(engine, [last])
        (expected,) = Engine(model).generate([text], sampling)
        assert last.output == expected.output
        assert last.usage.entries == expected.usage.entries
        text += last.output + more
    engine.runner.cache.check_integrity()
    assert engine.speed.prefill_tokens < len(text)


def test_memory_holds_what_the_decisions_say():
    model = tiny_model(settings_of(3))
    cache = model.new_cache(1, block_size=4)
    rows = cache.add_sequences(1)
    model.read(random_tokens(1)[:, 0], [LENGTH], cache, rows)
    kept = cache.cache_seqlens[:, rows]
    assert kept.float().mean() < 0.75 * LENGTH
    assert cache.blocks.num_in_use == (-(-kept // 4)).sum()
    memory = ModelMemory(model.config, model.dtype, model.method, 4)
    assert memory.shape.state_bytes == 4 * 4
    assert memory.cache([4]) < memory.cache([40]) < 40 * memory.cache([4])


def test_the_weights_of_an_adapter_are_counted():
    plain, adapted = tiny_model(), tiny_model(SETTINGS["own, adapter"])
    assert adapted.config.num_parameters - plain.config.num_parameters == 2 * 32 * (2 + 1)


def test_an_adapter_that_is_missing_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    from megatron_dmc.checkpoint.source import open_source
    from tests.inference.model_directory import write_model

    write_model(tmp_path / "model", SETTINGS["own, adapter"])
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.self_attn.dms_proj_alpha.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model\.layers\.1\.self_attn\.dms_proj_alpha\.weight"):
        open_source(tmp_path / "model")


def test_decisions_of_an_adapter_are_float32_whatever_the_model_is():
    source = RandomSource(tiny_llama(), SETTINGS["own, adapter"])
    model = Decoder(source, dtype="bfloat16")
    assert model.layers[0].decision.dtype == torch.float32
    assert model.logits(model.forward(random_tokens(2))).isfinite().all()

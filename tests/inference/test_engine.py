"""Text from prompts: the engine against transformers, and against itself in other batches."""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests.inference.tiny_model import Decoder, RandomSource, tiny_llama, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def assert_empty(engine):
    assert not engine.is_busy
    engine.runner.cache.check_integrity()
    assert engine.runner.cache.blocks.num_in_use == engine.runner.cache.rows.num_in_use == 0


def transformers_llama(source):
    """The same weights in transformers' own Llama."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(**to_hf_config(source.config))
    model = transformers.LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(source.tensors, strict=False)
    assert missing.unexpected_keys == []
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "tie_word_embeddings": True},
        {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 20},
        {"rope_scaling": RopeScaling("linear", 2.0)},
    ],
    ids=["mha", "mqa-tied", "gqa-llama3", "gqa-linear"],
)
def test_plain_llama_equals_transformers(changes):
    source = RandomSource(tiny_llama(**changes))
    model, theirs = Decoder(source), transformers_llama(source)
    token_BS = torch.tensor([PROMPTS[3]])
    logits = model.logits(model.forward(token_BS.T))[:, 0]
    torch.testing.assert_close(logits, theirs(token_BS).logits[0], atol=1e-4, rtol=1e-4)
    for request in Engine(model).generate(PROMPTS, SamplingParams(max_new_tokens=20)):
        generated = theirs.generate(torch.tensor([request.prompt]), max_new_tokens=20, do_sample=False)
        assert request.output == generated[0, len(request.prompt) :].tolist()
        assert request.usage.compression_ratio == 1.0
        assert request.usage.num_tokens == len(request.prompt) + 19


def test_texts_do_not_depend_on_the_batch():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_new_tokens=15, temperature=temperature, top_p=0.9, seed=3)
        alone = [Engine(model).generate([prompt], sampling)[0] for prompt in PROMPTS]
        together = Engine(model).generate(PROMPTS, sampling)
        two_at_once = Engine(model, max_sequences=2, block_size=3).generate(PROMPTS, sampling)
        for one, other, third in zip(alone, together, two_at_once, strict=True):
            assert one.output == other.output == third.output
            assert one.usage.entries == other.usage.entries == third.usage.entries
            assert one.usage.compression_ratio > 1.2


def test_greedy_text_equals_whole_forward_passes():
    model = tiny_model(DMCConfig(decision_bias=-1.0, window_size=12))
    (request,) = Engine(model).generate([PROMPTS[0]], SamplingParams(max_new_tokens=12))
    tokens = list(request.prompt)
    for token in request.output:
        assert model.logits(model.forward(torch.tensor(tokens).unsqueeze(1)))[-1, 0].argmax() == token
        tokens.append(token)


def test_any_end_token_ends_a_text_and_frees_its_memory():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    free = Engine(model).generate(PROMPTS, SamplingParams(max_new_tokens=10))
    ends = frozenset(request.output[4] for request in free[:2])
    engine = Engine(model)
    ended = engine.generate(PROMPTS, SamplingParams(max_new_tokens=10, end_tokens=ends))
    for one, whole in zip(ended[:2], free[:2], strict=True):
        assert one.output == whole.output[: min(whole.output.index(end) for end in ends & set(whole.output))]
        assert one.finish_reason == "eod"
    assert {request.finish_reason for request in ended} >= {"eod"}
    assert_empty(engine)


def test_a_request_that_does_not_fit_alone_fails_and_leaves_nothing_behind():
    engine = Engine(tiny_model(), num_blocks=20, block_size=4)
    (request,) = engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=60))
    assert request.finish_reason == "error"
    assert "give the cache more blocks" in request.error
    assert_empty(engine)
    assert engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=5))[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("settings", "num_blocks"),
    [
        (None, 100),
        (DMCConfig(decision_bias=-1.0), 60),
        (DMCConfig(decision_bias=-1.0, window_size=5), 60),
    ],
)
def test_a_full_cache_loses_no_request_and_changes_no_text(settings, num_blocks):
    model = tiny_model(settings)
    sampling = SamplingParams(max_new_tokens=25, temperature=1.0, seed=5)
    free = Engine(model).generate(PROMPTS, sampling)
    full = Engine(model, num_blocks=num_blocks, block_size=3, max_sequences=4)
    preempted, give_back = [], full.scheduler.give_back
    full.scheduler.give_back = lambda requests: (preempted.extend(requests), give_back(requests))
    crowded = full.generate(PROMPTS, sampling)
    assert [request.output for request in crowded] == [request.output for request in free]
    assert preempted
    assert_empty(full)


@pytest.mark.parametrize("prefill_tokens", [1, 7, 16])
def test_long_prompts_are_read_in_parts(prefill_tokens):
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=10)
    whole = Engine(model).generate(PROMPTS, sampling)
    parts = Engine(model, prefill_tokens=prefill_tokens).generate(PROMPTS, sampling)
    assert [request.output for request in parts] == [request.output for request in whole]
    assert [request.usage.entries for request in parts] == [request.usage.entries for request in whole]


def test_one_request_that_fails_leaves_the_others_alone():
    engine = Engine(tiny_model(DMCConfig(decision_bias=-1.0)))
    expected = Engine(engine.model).generate(PROMPTS, SamplingParams(max_new_tokens=8))

    def listen(token):
        raise OSError("the pipe is closed")

    requests = [Request(list(prompt), SamplingParams(max_new_tokens=8)) for prompt in PROMPTS]
    requests[1].on_token = listen
    engine.submit(requests)
    engine.step()
    engine.abort(requests[3])
    while engine.is_busy:
        engine.step()
    assert [request.finish_reason for request in requests] == ["length", "error", "length", "aborted"]
    assert "the pipe is closed" in requests[1].error
    assert [requests[index].output for index in (0, 2)] == [expected[index].output for index in (0, 2)]
    assert_empty(engine)


def test_an_interrupt_gives_everything_back_once(monkeypatch):
    """Also where it comes while requests are being ended."""
    engine = Engine(tiny_model())
    ends = engine.runner.release

    def interrupted(request):
        ends(request)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.runner, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert_empty(engine)
    assert len(engine.runner.cache.add_sequences(32)) == 32


def test_weights_that_are_not_numbers_fail_the_request():
    source = RandomSource(tiny_llama())
    source.tensors["model.norm.weight"] = torch.full((32,), torch.nan)
    (request,) = Engine(Decoder(source)).generate([[1]], SamplingParams(max_new_tokens=3))
    assert request.finish_reason == "error"
    assert "not finite" in request.error


@pytest.mark.parametrize(
    ("prompt", "max_new_tokens", "message"),
    [
        ([], 5, "prompt 1 is empty"),
        ([50], 5, "token 50: the model's vocabulary is 0..49"),
        ([-1], 5, "token -1"),
        ([1] * 100, 29, "100 tokens and may grow by 29: the model reads at most 128"),
    ],
)
def test_impossible_prompts_are_refused_before_any_work(prompt, max_new_tokens, message):
    engine = Engine(tiny_model())
    with pytest.raises(ValueError, match=message):
        engine.submit(
            [
                Request([1], SamplingParams(max_new_tokens=5)),
                Request(prompt, SamplingParams(max_new_tokens=max_new_tokens)),
            ]
        )
    assert not engine.is_busy


def test_weights_of_another_shape_are_refused():
    source = RandomSource(tiny_llama())
    source.tensors["model.norm.weight"] = torch.ones(31)
    with pytest.raises(
        ValueError, match=r"model.norm.weight has shape \(31,\): the model's configuration says \(32,\)"
    ):
        Decoder(source)
    with pytest.raises(ValueError, match="dtype='int8': must be one of float32"):
        Decoder(RandomSource(tiny_llama()), dtype="int8")

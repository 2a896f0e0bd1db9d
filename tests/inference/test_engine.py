"""Text from prompts: the engine against transformers, and against itself in other batches."""

import dataclasses

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.expectation import ExpectedText
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests.inference.tiny_model import Decoder, RandomSource, tiny_llama, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


def decode(ids):
    """A tokenizer of letters."""
    return "".join(chr(ord("A") + number) for number in ids)


def finish(engine, requests):
    engine.submit(requests)
    while engine.is_busy:
        engine.step()
    return requests


def hopeful(engine):
    """Let an engine expect that requests need nothing; returns those that lose their memory."""
    engine.expectation.num_heads = 0
    engine.expectation.text = engine.expectation.sample = lambda request: ExpectedText(1, 0, 0, 0)
    preempted, give_back = [], engine.scheduler.give_back
    engine.scheduler.give_back = lambda requests: (preempted.extend(requests), give_back(requests))
    return preempted


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
    preempted = hopeful(full)
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
    engine = Engine(tiny_model(DMCConfig(decision_bias=-1.0)), decode=decode)
    expected = Engine(engine.model).generate(PROMPTS, SamplingParams(max_new_tokens=8))

    def listen(text):
        raise OSError("the pipe is closed")

    requests = [Request(list(prompt), SamplingParams(max_new_tokens=8)) for prompt in PROMPTS]
    requests[1].on_text = listen
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


def test_what_is_refused_leaves_what_runs_alone():
    engine, sampling = Engine(tiny_model()), SamplingParams(max_new_tokens=5)
    expected = Engine(engine.model).generate(PROMPTS, sampling)
    requests = [Request(list(prompt), sampling) for prompt in PROMPTS]
    engine.submit(requests)
    engine.step()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        engine.submit([Request([1], sampling), Request([], sampling)])
    finish(engine, [])
    assert [request.output for request in requests] == [request.output for request in expected]
    assert_empty(engine)


def test_weights_of_another_shape_are_refused():
    source = RandomSource(tiny_llama())
    source.tensors["model.norm.weight"] = torch.ones(31)
    with pytest.raises(
        ValueError, match=r"model.norm.weight has shape \(31,\): the model's configuration says \(32,\)"
    ):
        Decoder(source)
    with pytest.raises(ValueError, match="dtype='int8': must be one of float32"):
        Decoder(RandomSource(tiny_llama()), dtype="int8")


@pytest.mark.parametrize("num_blocks", [None, 90])
def test_samples_share_the_prompt_and_are_those_of_requests_alone(num_blocks):
    """1. Every seed on its own; 2. three samples of each prompt, the prompt read once."""
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=12, temperature=1.0, seed=7)
    engine = Engine(model, block_size=4, num_blocks=num_blocks)
    samples = engine.generate(PROMPTS, sampling, n=3)
    for place, request in enumerate(samples):
        own = dataclasses.replace(sampling, seed=7 + place % 3)
        (alone,) = Engine(model, block_size=4).generate([PROMPTS[place // 3]], own)
        assert request.output == alone.output
        assert request.usage.entries == alone.usage.entries
    assert len({tuple(request.output) for request in samples[:3]}) == 3
    assert engine.speed.prefill_tokens <= sum(map(len, PROMPTS))
    assert_empty(engine)


def test_shared_blocks_are_held_once():
    model = tiny_model()
    engine = Engine(model, block_size=4)
    requests = Request([1] * 30, SamplingParams(max_new_tokens=2)).samples(5)
    engine.submit(requests)
    engine.step()
    assert len(engine.scheduler.running) == 5
    # 8 blocks for each of 4 head caches, of which the last one is copied at most.
    assert engine.runner.cache.blocks.num_in_use <= 4 * (8 + 4)
    finish(engine, [])
    assert_empty(engine)


@pytest.mark.parametrize("max_sequences", [2, 3])
def test_samples_without_room_read_their_prompt_alone(max_sequences):
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=9, temperature=1.0)
    free = Engine(model).generate(PROMPTS[:2], sampling, n=4)
    few = Engine(model, max_sequences=max_sequences)
    assert [one.output for one in few.generate(PROMPTS[:2], sampling, n=4)] == [one.output for one in free]
    assert_empty(few)


def test_samples_survive_a_full_cache():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=25, temperature=1.0)
    free = Engine(model).generate(PROMPTS, sampling, n=3)
    full = Engine(model, num_blocks=90, block_size=3, max_sequences=8)
    preempted = hopeful(full)
    crowded = full.generate(PROMPTS, sampling, n=3)
    assert [request.output for request in crowded] == [request.output for request in free]
    assert preempted
    assert_empty(full)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_sample_that_is_cancelled_leaves_the_others(gone):
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=6, temperature=1.0)
    expected = Engine(model).generate([PROMPTS[3]], sampling, n=3)
    for passes in (0, 1, 4):
        engine = Engine(model, prefill_tokens=16)
        requests = Request(PROMPTS[3], sampling).samples(3)
        engine.submit(requests)
        for _ in range(passes):
            engine.step()
        engine.abort(requests[gone])
        finish(engine, [])
        assert requests[gone].finish_reason == "aborted"
        for one, other in zip(requests, expected, strict=True):
            assert one is requests[gone] or one.output == other.output
        assert_empty(engine)


def test_log_probabilities_are_those_of_whole_passes():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(
        max_new_tokens=8, temperature=2.0, repetition_penalty=1.5, logprobs=3, prompt_logprobs=True
    )
    for prefill_tokens in (100, 7):
        (request,) = Engine(model, prefill_tokens=prefill_tokens).generate([PROMPTS[3]], sampling)
        tokens = request.prompt + request.output
        expected = model.logits(model.forward(torch.tensor(tokens).unsqueeze(1)))[:, 0].log_softmax(-1)
        stated = request.prompt_logprobs + request.logprobs
        assert [one.token for one in stated] == tokens[1:]
        for place, one in enumerate(stated):
            assert one.logprob == pytest.approx(expected[place, one.token].item(), abs=1e-4)
            best = expected[place].topk(3)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert [logprob for _, logprob in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_log_probabilities_survive_a_full_cache_and_are_shared_by_samples():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=20, temperature=1.0, logprobs=0, prompt_logprobs=True)
    free = Engine(model).generate(PROMPTS, sampling, n=2)
    full = Engine(model, num_blocks=70, block_size=3, max_sequences=8)
    preempted = hopeful(full)
    for one, other in zip(full.generate(PROMPTS, sampling, n=2), free, strict=True):
        assert len(one.prompt_logprobs) == len(one.prompt) - 1
        for stated, expected in ((one.logprobs, other.logprobs), (one.prompt_logprobs, other.prompt_logprobs)):
            assert [x.token for x in stated] == [x.token for x in expected]
            assert [x.logprob for x in stated] == pytest.approx([x.logprob for x in expected], abs=1e-4)
            assert not any(x.top for x in stated)
    assert preempted


def test_an_end_token_has_no_log_probability():
    model = tiny_model()
    free = Engine(model).generate([PROMPTS[0]], SamplingParams(max_new_tokens=5))[0].output
    sampling = SamplingParams(max_new_tokens=5, end_tokens=frozenset(free[3:4]), logprobs=1)
    (request,) = Engine(model).generate([PROMPTS[0]], sampling)
    assert [one.token for one in request.logprobs] == request.output


def test_a_penalty_counts_prompt_and_text_as_in_transformers():
    source = RandomSource(tiny_llama())
    engine, theirs = Engine(Decoder(source), max_sequences=2), transformers_llama(source)
    plain = engine.generate(PROMPTS, SamplingParams(max_new_tokens=15))
    requests = [
        Request(list(prompt), SamplingParams(max_new_tokens=15, repetition_penalty=penalty))
        for prompt, penalty in zip(PROMPTS, (1.4, 1.0, 1.2, 1.3), strict=True)
    ]
    for request, without in zip(finish(engine, requests), plain, strict=True):
        generated = theirs.generate(
            torch.tensor([request.prompt]),
            max_new_tokens=15,
            do_sample=False,
            repetition_penalty=request.sampling.repetition_penalty,
        )
        assert request.output == generated[0, len(request.prompt) :].tolist()
        assert (request.output == without.output) == (request.sampling.repetition_penalty == 1)


def test_a_text_ends_before_a_stop_string_and_is_streamed_up_to_there():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    (free,) = Engine(model, decode=decode).generate([PROMPTS[0]], SamplingParams(max_new_tokens=12))
    assert free.text == decode(free.output)
    stop = free.text[5:8]
    engine = Engine(model, decode=decode)
    pieces = []
    request = Request(PROMPTS[0], SamplingParams(max_new_tokens=12, stop=("never", stop)), on_text=pieces.append)
    finish(engine, [request])
    assert request.finish_reason == "stop"
    assert "".join(pieces) == request.text == free.text[: free.text.index(stop)]
    assert all(pieces)
    assert request.output == free.output[: free.text.index(stop) + 3]
    assert_empty(engine)


def test_text_without_a_tokenizer_is_refused():
    engine = Engine(tiny_model())
    for asks in (
        {"sampling": SamplingParams(stop=("a",), max_new_tokens=3)},
        {"sampling": SamplingParams(max_new_tokens=3), "on_text": print},
    ):
        with pytest.raises(ValueError, match="prompt 0 asks for text or stop strings: give the engine a tokenizer"):
            engine.submit([Request([1], **asks)])


@pytest.mark.parametrize("window_size", [None, 0, 5])
def test_a_kept_request_is_continued_by_its_new_tokens_alone(window_size):
    model = tiny_model(None if window_size is None else DMCConfig(decision_bias=-1.0, window_size=window_size))
    sampling = SamplingParams(max_new_tokens=6)
    engine = Engine(model)
    (first,) = finish(engine, [Request(PROMPTS[0], sampling, keep=True)])
    assert engine.runner.cache.rows.num_in_use == 1
    prompt = first.prompt + first.output + [11, 12, 13]
    before = engine.speed.prefill_tokens
    (second,) = finish(engine, [Request(prompt, sampling, keep=True, follows=first)])
    # The last token of a text was not read yet.
    assert engine.speed.prefill_tokens - before == 1 + 3
    (alone,) = Engine(model).generate([prompt], sampling)
    assert second.output == alone.output
    assert second.usage.entries == alone.usage.entries
    (other,) = finish(engine, [Request([9] + prompt, sampling, keep=True, follows=second)])
    assert other.output == Engine(model).generate([[9] + prompt], sampling)[0].output
    assert engine.runner.cache.rows.num_in_use == 1, "a text that was changed is read whole, and the old one is freed"
    engine.forget(other)
    assert_empty(engine)


def test_a_cancelled_request_that_is_kept_goes_on():
    model = tiny_model(DMCConfig(decision_bias=-1.0))
    sampling = SamplingParams(max_new_tokens=20)
    engine = Engine(model, prefill_tokens=16)
    for passes in (1, 6):
        request = Request(PROMPTS[3], sampling, keep=True)
        engine.submit([request])
        for _ in range(passes):
            engine.step()
        engine.abort(request)
        prompt = request.prompt + request.output + [5]
        (next_one,) = finish(engine, [Request(prompt, sampling, follows=request)])
        assert next_one.output == Engine(model).generate([prompt], sampling)[0].output
        assert_empty(engine)


def test_what_is_kept_makes_room_for_what_runs():
    """By rows and by blocks; a conversation that was forgotten is read again."""
    model = tiny_model()
    sampling = SamplingParams(max_new_tokens=10)
    expected = Engine(model).generate(PROMPTS, sampling)
    for size in ({"max_sequences": 2}, {"num_blocks": 60, "block_size": 4}):
        engine = Engine(model, **size)
        kept = finish(engine, [Request(list(prompt), sampling, keep=True) for prompt in PROMPTS[:2]])
        assert engine.runner.cache.rows.num_in_use == 2
        (waits,) = [Request(kept[0].prompt + kept[0].output + [3], sampling, follows=kept[0])]
        engine.submit([waits])
        assert [one.output for one in engine.generate(PROMPTS, sampling)] == [one.output for one in expected]
        assert waits.output == Engine(model).generate([waits.prompt], sampling)[0].output
        engine.forget(kept[1])
        assert_empty(engine)


def test_prompts_are_admitted_by_what_survives_of_them():
    """A pool for a quarter of the entries: all prompts at once would not fit by their length."""
    model = tiny_model(DMCConfig(decision_bias=-4.0), max_position_embeddings=512)
    prompts = [[(7 * place + start) % 50 for place in range(200)] for start in range(12)]
    sampling = SamplingParams(max_new_tokens=10)
    free = Engine(model).generate(prompts, sampling)
    ratio = min(request.usage.compression_ratio for request in free)
    assert ratio > 3
    # A prompt needs 4 heads x 53 blocks by its length.
    engine = Engine(model, block_size=4, num_blocks=4 * 53 * 3)
    together, run = [], engine.runner.run
    engine.runner.run = lambda batch: (together.append(len(engine.scheduler.running)), run(batch))[1]
    assert [request.output for request in engine.generate(prompts, sampling)] == [request.output for request in free]
    assert max(together) > 3
    assert_empty(engine)


def test_a_prompt_that_outgrows_what_was_expected_is_read_again():
    """The cache gets full in the middle of a pass over several prompts; then they come one after the other."""
    model = tiny_model()
    sampling = SamplingParams(max_new_tokens=4)
    prompts = [[start] * 30 for start in range(6)]
    expected = Engine(model).generate(prompts, sampling)
    engine = Engine(model, block_size=4, num_blocks=4 * 9 + 20)
    for _ in range(100):
        engine.expectation.observe_held(4, num_tokens=400)
    preempted, give_back = [], engine.scheduler.give_back
    engine.scheduler.give_back = lambda requests: (preempted.extend(requests), give_back(requests))
    assert [request.output for request in engine.generate(prompts, sampling)] == [one.output for one in expected]
    assert len(preempted) >= 6
    assert_empty(engine)


def test_speed_counts_prompts_and_steps():
    engine = Engine(tiny_model(), prefill_tokens=16)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=5))
    speed = engine.speed.to_dict()
    assert speed["prefill_tokens"] + speed["decode_tokens"] == sum(map(len, PROMPTS)) + 4 * len(PROMPTS)
    assert speed["decode_tokens"] >= 4 * len(PROMPTS)
    assert min(speed["prefill_tokens_per_second"], speed["decode_tokens_per_second"]) > 0
    assert "tokens/s; decode: " in engine.speed.summary()

"""Text from prompts: the engine against transformers, and against itself in other batches."""

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.block_allocator import OutOfBlocks
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.models.config import RopeScaling, to_hf_config
from tests.inference.tiny_model import Decoder, RandomSource, tiny_llama, tiny_model

PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
LLAMA3 = RopeScaling("llama3", 8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)


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
    assert engine.cache.allocator.num_in_use == 0
    assert engine.cache.num_free_sequences == 32


def test_a_full_cache_is_an_error_and_leaves_nothing_behind():
    engine = Engine(tiny_model(), num_blocks=20, block_size=4)
    with pytest.raises(OutOfBlocks, match="give the cache more blocks"):
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=60))
    assert not engine.is_busy
    assert engine.cache.allocator.num_in_use == 0
    assert engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=5))[0].finish_reason == "length"


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

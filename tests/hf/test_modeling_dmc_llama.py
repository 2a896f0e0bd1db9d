"""Exported models in transformers: the same numbers as our engine, and clear refusals."""

import subprocess
import sys

import pytest
import torch

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests.inference.model_directory import VOCAB_SIZE, write_model

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("megatron_dmc.hf")

SETTINGS = DMCConfig(decision_bias=-1.0, window_size=12)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6], [27], [31, 41, 5], list(range(40))]
PAD = 0
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def load(directory, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    write_model(path, SETTINGS)
    return path


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


@pytest.fixture(scope="module")
def ours(directory):
    return Decoder(open_source(directory))


def random_tokens(batch=3, length=50):
    return torch.randint(0, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(0))


def our_logits(ours, token_BS):
    return ours.logits(ours.forward(token_BS.T)).transpose(0, 1)


def padded(prompts, side):
    """Token ids [B, S] and attention mask with padding on one side."""
    longest = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        padding, zeros = [PAD] * (longest - len(prompt)), [0] * (longest - len(prompt))
        rows.append(padding + prompt if side == "left" else prompt + padding)
        masks.append(zeros + [1] * len(prompt) if side == "left" else [1] * len(prompt) + zeros)
    return torch.tensor(rows), torch.tensor(masks)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "flex_attention"])
def test_attention_is_its_own_whatever_a_script_asks_for(directory, model, name):
    tokens_BS = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(load(directory, attn_implementation=name)(tokens_BS).logits, model(tokens_BS).logits)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 4},
        {"num_kv_heads": 1, "tie_word_embeddings": True},
        {"rope_scaling": RopeScaling("llama3", 8.0, original_max_position_embeddings=32), "rope_theta": 500000.0},
        {"rope_scaling": RopeScaling("linear", 2.0)},
    ],
    ids=["mha", "mqa-tied", "gqa-llama3", "gqa-linear"],
)
def test_forward_equals_our_model(changes, tmp_path):
    source = write_model(tmp_path / "model", SETTINGS, **changes)
    model = load(tmp_path / "model")
    assert type(model) is hf.DMCLlamaForCausalLM
    assert model.config.settings() == SETTINGS
    expected = our_logits(Decoder(source), random_tokens())
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens(), use_cache=False).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(random_tokens()).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_honoured(side, model, ours):
    token_BS, mask_BS = padded(PROMPTS, side)
    with torch.no_grad():
        outputs = model(token_BS, attention_mask=mask_BS, output_hidden_states=True)
    assert len(outputs.hidden_states) == model.config.num_hidden_layers + 1
    embedded = model.model.embed_tokens(token_BS) * mask_BS.unsqueeze(-1)
    torch.testing.assert_close(outputs.hidden_states[0], embedded, **TOLERANCE)
    for row, prompt in enumerate(PROMPTS):
        expected = our_logits(ours, torch.tensor([prompt]))[0]
        torch.testing.assert_close(outputs.logits[row, mask_BS[row].bool()], expected, **TOLERANCE)
    assert outputs.past_key_values.paged.num_tokens == [len(prompt) for prompt in PROMPTS]


def test_greedy_texts_equal_our_engine(model, ours):
    token_BS, mask_BS = padded(PROMPTS, "left")
    generated = model.generate(
        token_BS,
        attention_mask=mask_BS,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        return_dict_in_generate=True,
    )
    requests = Engine(ours).generate(PROMPTS, SamplingParams(max_new_tokens=20))
    assert generated.sequences[:, token_BS.shape[1] :].tolist() == [request.output for request in requests]
    usage = generated.past_key_values.usage()
    assert usage.num_entries == sum(request.usage.num_entries for request in requests)
    assert usage.compression_ratio > 1.2
    assert generated.past_key_values.get_seq_length() == token_BS.shape[1] + 19


def test_sampling_works(model):
    torch.manual_seed(0)
    generated = model.generate(
        random_tokens(1, 5), do_sample=True, max_new_tokens=10, num_return_sequences=3, eos_token_id=None
    )
    assert generated.shape == (3, 15)


def test_a_cache_goes_on_where_a_text_ended(model, ours):
    """First pass, several tokens at once, one token; then a text that continues another."""
    token_BS = random_tokens()
    expected = our_logits(ours, token_BS)
    with torch.no_grad():
        first = model(token_BS[:, :20])
        second = model(token_BS[:, 20:49], past_key_values=first.past_key_values)
        third = model(token_BS[:, 49:], past_key_values=second.past_key_values)
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    cache = hf.DMCCache(model.config, block_size=4)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    start = model.generate(token_BS[:1], past_key_values=cache, **options)
    longer = torch.cat([start, token_BS[:1, :6]], dim=1)
    went_on = model.generate(longer, past_key_values=cache, **options)
    assert torch.equal(went_on, model.generate(longer, **options))
    cache.reset()
    assert torch.equal(model.generate(token_BS[:1], past_key_values=cache, **options), start)


def test_loss_and_its_gradient(model, directory, ours):
    token_BS = random_tokens()
    trained = load(directory).train()
    outputs = trained(token_BS, labels=token_BS)
    assert outputs.past_key_values is None
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    log_probs = our_logits(ours, token_BS)[:, :-1].log_softmax(-1)
    expected = -log_probs.gather(-1, token_BS[:, 1:].unsqueeze(-1)).mean()
    torch.testing.assert_close(outputs.loss.detach(), expected, **TOLERANCE)


def test_save_pretrained_writes_a_model_that_we_read(model, ours, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = open_source(tmp_path / "again")
    assert again.dmc == SETTINGS
    assert again.config == ours.config
    assert torch.equal(again.tensor("model.norm.weight"), ours.final_norm)


def test_bfloat16_generates(directory):
    model = load(directory, dtype=torch.bfloat16)
    generated = model.generate(random_tokens(2, 10), do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert generated.shape == (2, 15)


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_what_takes_back_tokens_is_refused(model, options):
    with pytest.raises(ValueError, match="DMCLlamaForCausalLM only supports"):
        model.generate(random_tokens(1, 5), max_new_tokens=5, **options)


def test_assisted_decoding_is_refused_in_either_role(model):
    with pytest.raises(ValueError, match="DMCLlamaForCausalLM only supports"):
        model.generate(random_tokens(1, 5), max_new_tokens=5, assistant_model=model)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf_config(model.config.shape())))
    with pytest.raises(ValueError, match="merged tokens cannot be taken apart"):
        plain.generate(random_tokens(1, 5), max_new_tokens=15, do_sample=False, assistant_model=model)


@pytest.mark.parametrize(
    "operation", ["crop", "reorder_cache", "batch_repeat_interleave", "batch_select_indices", "activate_past_recording"]
)
def test_the_cache_refuses_what_it_cannot_do(model, operation):
    with torch.no_grad():
        cache = model(random_tokens()).past_key_values
    before = cache.usage()
    with pytest.raises(ValueError, match="does not work with a compressed cache: merged tokens cannot be taken apart"):
        getattr(cache, operation)(*([] if operation == "activate_past_recording" else [1]))
    assert cache.usage() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"past_key_values": transformers.DynamicCache()},
            "past_key_values is a DynamicCache: this model needs a DMCCache",
        ),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "a row without tokens or with a hole"),
        ({"attention_mask": torch.zeros(1, 5)}, "a row without tokens or with a hole"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\): must be \(1, 5\)"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, "position_ids must count the tokens of each row from 0"),
        ({"output_attentions": True}, "attention weights are never formed"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "either input_ids or inputs_embeds"),
    ],
)
def test_wrong_input_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 5), **options)


def test_a_cache_of_another_batch_or_model_is_refused(model):
    with torch.no_grad():
        cache = model(random_tokens(3, 5)).past_key_values
        with pytest.raises(ValueError, match="the cache holds 3 sequences, 2 were given"):
            model(random_tokens(2, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="only a first pass is padded"):
            model(random_tokens(3, 2), past_key_values=cache, attention_mask=torch.eye(7)[:3])
    with pytest.raises(ValueError, match="written by DMCLlamaForCausalLM only"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(ValueError, match="the cache is empty"):
        hf.DMCCache(model.config).usage()


def test_settings_of_another_release_are_refused():
    with pytest.raises(ValueError, match="schema_version=99: this release reads 1"):
        hf.DMCLlamaConfig(dmc={**SETTINGS.to_dict(), "schema_version": 99})
    with pytest.raises(ValueError, match="attention_bias=True is not supported"):
        hf.DMCLlamaForCausalLM(hf.DMCLlamaConfig(dmc=SETTINGS.to_dict(), hidden_size=32, attention_bias=True))


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("sys.modules['transformers'] = None", "megatron_dmc.hf needs transformers"),
        (
            "import transformers; transformers.__version__ = '5.3.0'",
            "transformers 5.3.0 is no release >=5.17: pip install 'megatron_dmc[hf]'",
        ),
    ],
    ids=["missing", "old"],
)
def test_without_a_usable_transformers_the_message_says_what_to_install(sabotage, message):
    script = f"import sys; {sabotage}; import megatron_dmc.hf"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 1
    assert f"ImportError: {message}" in finished.stderr
    assert "pip install '" in finished.stderr

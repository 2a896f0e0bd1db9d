"""Exported models in transformers: the same numbers as our engine, and clear refusals."""

import subprocess
import sys

import pytest
import torch

from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.models.families import family_of
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests.hf.exported import PROMPTS, SETTINGS, TOLERANCE, load, our_logits, padded, random_tokens
from tests.inference.model_directory import write_model
from tests.inference.tiny_model import QWEN2, QWEN3

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("megatron_dmc.hf")


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
        QWEN2,
        QWEN3,
    ],
    ids=["mha", "mqa-tied", "gqa-llama3", "gqa-linear", "qwen2", "qwen3"],
)
def test_forward_equals_our_model(changes, tmp_path):
    source = write_model(tmp_path / "model", SETTINGS, **changes)
    model = load(tmp_path / "model")
    assert type(model).__name__ == family_of(source.config.family).dmc_architecture
    assert model.config.settings() == SETTINGS
    expected = our_logits(Decoder(source), random_tokens())
    with torch.no_grad():
        torch.testing.assert_close(model(random_tokens(), use_cache=False).logits, expected, **TOLERANCE)
        torch.testing.assert_close(model(random_tokens()).logits, expected, **TOLERANCE)


@pytest.mark.parametrize("decision_source", ["neuron", "adapter"])
@pytest.mark.parametrize("decided_by", ["own", "next"])
def test_models_that_evict_equal_ours(decided_by, decision_source, tmp_path):
    """At once, with padding, and on from a cache in parts."""
    settings = DMCConfig(
        "dms", window_size=3, decision_bias=0.0, decided_by=decided_by, decision_source=decision_source
    )
    ours = Decoder(write_model(tmp_path / "model", settings))
    model = load(tmp_path / "model")
    token_BS = random_tokens()
    expected = our_logits(ours, token_BS)
    with torch.no_grad():
        torch.testing.assert_close(model(token_BS, use_cache=False).logits, expected, **TOLERANCE)
        cache = None
        for part in token_BS.split([20, 1, 28, 1], dim=1):
            outputs = model(part, past_key_values=cache)
            cache = outputs.past_key_values
            read = cache.get_seq_length()
            torch.testing.assert_close(outputs.logits, expected[:, read - part.shape[1] : read], **TOLERANCE)
        assert cache.usage().compression_ratio > 1.3
        padded_BS, mask_BS = padded(PROMPTS, "left")
        logits = model(padded_BS, attention_mask=mask_BS).logits
    for row, prompt in enumerate(PROMPTS):
        alone = our_logits(ours, torch.tensor([prompt]))[0]
        torch.testing.assert_close(logits[row, mask_BS[row].bool()], alone, **TOLERANCE)


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


def test_a_cache_goes_on_where_a_text_ended(model, ours):
    """First pass, several tokens at once, one token."""
    token_BS = random_tokens()
    expected = our_logits(ours, token_BS)
    with torch.no_grad():
        first = model(token_BS[:, :20])
        second = model(token_BS[:, 20:49], past_key_values=first.past_key_values)
        third = model(token_BS[:, 49:], past_key_values=second.past_key_values)
    logits = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(logits, expected, **TOLERANCE)


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


def gradients(model, token_BS, **options):
    """Of the loss, of every parameter by name."""
    model.zero_grad()
    model(token_BS, labels=token_BS, **options).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_in_other_modes(directory):
    """Without a cache they flow, recomputed too; through a cache they are refused, never wrong in silence."""
    model, token_BS = load(directory).train(), random_tokens()
    expected = gradients(model, token_BS)
    torch.testing.assert_close(gradients(model.eval(), token_BS, use_cache=False), expected)
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(gradients(model, token_BS), expected)
    for is_training, options in ((False, {}), (True, {"use_cache": True})):
        with pytest.raises(ValueError, match="no gradient passes a compressed cache: call the model with use_cache=Fa"):
            gradients(model.train(is_training), token_BS, **options)
    model.requires_grad_(False)
    assert not model.eval()(token_BS).logits.requires_grad


def test_outputs_as_a_tuple_and_by_configuration(directory):
    model, token_BS = load(directory, output_hidden_states=True), random_tokens(1, 9)
    with torch.no_grad():
        whole = model(token_BS)
        logits, cache, states = model(token_BS, return_dict=False)
        last, *_ = model.model(token_BS, return_dict=False)
    assert torch.equal(logits, whole.logits)
    assert isinstance(cache, hf.DMCCache)
    assert len(states) == len(whole.hidden_states) == 3
    assert torch.equal(last, whole.hidden_states[-1])


def test_compiled_it_runs_as_it_is_written(directory):
    """Its body is left out of the graph; one graph of all cannot be had."""
    model, token_BS = load(directory), random_tokens(1, 9)
    whole_graph = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="a compressed cache has lengths that only the tokens decide"):
        whole_graph(token_BS)
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")(token_BS).logits
    torch.compiler.reset()
    assert torch.equal(compiled, model(token_BS).logits)


def test_save_pretrained_writes_a_model_that_we_read(model, ours, tmp_path):
    model.save_pretrained(tmp_path / "again")
    again = open_source(tmp_path / "again")
    assert again.dmc == SETTINGS
    assert again.config == ours.config
    assert torch.equal(again.tensor("model.norm.weight"), ours.final_norm)


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

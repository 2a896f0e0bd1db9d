"""Qwen 2 and Qwen 3 through converter, Megatron's layers, training, decoder and evaluation, against transformers.

In Qwen 2 the projections of queries, keys and values have biases, in Qwen 3 queries and keys are normalised.
"""

import dataclasses
import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.inspect import inspect_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from checkpoints_convert.verify import verify
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.perplexity import BOTH, evaluate
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.models.borrowed_channel import borrowed_rows
from tests.checkpoints_convert.models import VARIANTS, transformers_logits, write_model, write_with_transformers
from tests.short_run import train_stage, write_data

pytest.importorskip("transformers")

UNVERIFIED = Options(verify=False)
TOKENS = [*range(3, 26), 96]
COMPRESSING = DMCConfig(stage="consolidate", decision_bias=0.0, window_size=4)
PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": ""}
NEEDS_MEGATRON = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")
BORROWED = {
    "qwen2": ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias"),
    "qwen3": ("q_norm.weight", "k_norm.weight"),
}
"""What makes a borrowed channel zero where it is zero at its end."""


@pytest.fixture(params=["qwen2", "qwen3"])
def config(request):
    # 256 tokens: Megatron's own model has the rows that pad a vocabulary in its softmax.
    return dataclasses.replace(VARIANTS[request.param], num_layers=2, vocab_size=256)


def decoded(directory) -> torch.Tensor:
    model = Decoder(open_source(directory))
    return model.logits(model.forward(torch.tensor(TOKENS)[:, None]))[:, 0]


def of_transformers(directory) -> torch.Tensor:
    return transformers_logits(directory, [TOKENS])[0]


def loss_of_transformers(directory) -> float:
    targets = torch.tensor([*TOKENS[1:], TOKENS[0]])
    return float(torch.nn.functional.cross_entropy(of_transformers(directory), targets))


def test_the_decoder_computes_what_transformers_computes(config, tmp_path):
    source = write_with_transformers(tmp_path / "hf", config)
    assert open_source(source).config == config
    torch.testing.assert_close(decoded(source), of_transformers(source), rtol=1e-5, atol=1e-4)


def test_without_its_borrowed_channels_it_computes_what_zero_out_ends_with(config, tmp_path):
    trained = write_model(tmp_path / "trained", config, DMCConfig(stage="zero_out"))
    import_checkpoint(trained, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "plain", options=UNVERIFIED)
    assert verify(tmp_path / "megatron", tmp_path / "plain", logits=False).clears_borrowed == (True, False)
    plain, before = load_file(tmp_path / "plain" / "model.safetensors"), load_file(trained / "model.safetensors")
    changed = {name for name in before if not torch.equal(plain[name], before[name])}
    assert changed == {
        f"model.layers.{layer}.self_attn.{part}" for layer in range(2) for part in BORROWED[config.family]
    }
    for name in changed:
        kept, cleared = (weights[name].unflatten(0, (-1, config.head_dim)) for weights in (before, plain))
        assert torch.equal(cleared[:, :-1], kept[:, :-1])
        assert not cleared[:, -1].any()
    torch.testing.assert_close(decoded(trained), of_transformers(tmp_path / "plain"), rtol=1e-5, atol=1e-4)


def test_both_paths_of_a_compressed_one_agree(config, tmp_path):
    model = Decoder(open_source(write_model(tmp_path / "hf", config, COMPRESSING)))
    tokens = torch.randint(config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    result = evaluate(model, tokens, path=BOTH)
    assert result.decode.compression_ratio > 1.2
    assert result.agreement.failures() == []


def test_a_compressed_one_says_what_it_is(config, tmp_path):
    source = write_model(tmp_path / "hf", config, COMPRESSING)
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    for place in (source, tmp_path / "megatron"):
        found = inspect_checkpoint(place)
        assert found.problems == []
        assert found.facts["model"] == dataclasses.asdict(config)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == f"dmc_{config.family}"
    assert f"A {config.family} model retrofitted" in (tmp_path / "back" / "README.md").read_text()


@NEEDS_MEGATRON
@pytest.mark.slow
def test_training_and_what_comes_of_it(config, tmp_path):
    source = write_with_transformers(tmp_path / "hf", config)
    import_checkpoint(source, tmp_path / "base", options=UNVERIFIED)
    write_data(tmp_path, TOKENS, config.vocab_size)
    first = _train(tmp_path, "zero_out", "base", 1, ranks=2, **PARALLEL)
    assert first[0]["lm loss"] == pytest.approx(loss_of_transformers(source), abs=1e-4)

    _train(tmp_path, "retrofit", "zero_out", 1, lr=0, min_lr=0)
    started = open_source(tmp_path / "retrofit")
    for name in ("q_proj.weight", "k_proj.weight", *BORROWED[config.family]):
        rows = borrowed_rows(started.tensor(f"model.layers.1.self_attn.{name}"), config.head_dim)
        assert (rows == float("norm" in name)).all()
    _train(tmp_path, "consolidate", "retrofit", 2)
    trained = open_source(tmp_path / "consolidate")
    for name in ("k_proj.weight", "k_proj.bias")[: 1 + config.qkv_bias]:
        rows = borrowed_rows(trained.tensor(f"model.layers.1.self_attn.{name}"), config.head_dim)
        assert (rows != 0).any()

    export_checkpoint(tmp_path / "consolidate", tmp_path / "exported", options=UNVERIFIED)
    model = Decoder(open_source(tmp_path / "exported"))
    assert evaluate(model, torch.tensor([TOKENS]), path=BOTH).agreement.failures() == []


@NEEDS_MEGATRON
@pytest.mark.exhaustive
def test_layouts_train_the_same_biases_and_norms(config, tmp_path):
    """And stage ``off``, Megatron's own model, starts with the same."""
    source = write_with_transformers(tmp_path / "hf", config)
    import_checkpoint(source, tmp_path / "base", options=UNVERIFIED)
    write_data(tmp_path, TOKENS, config.vocab_size)
    usual = {"lr": 1e-2, "min_lr": 1e-2, "save": None}
    alone = _train(tmp_path, "zero_out", "base", 3, **usual)
    shared = _train(tmp_path, "zero_out", "base", 3, ranks=2, **usual, **PARALLEL)
    assert len({step["lm loss"] for step in alone}) == 3
    for one, other in zip(alone, shared, strict=True):
        assert other["lm loss"] == pytest.approx(one["lm loss"], abs=1e-4)
    stock = _train(tmp_path, "off", "base", 1, **usual)
    assert stock[0]["lm loss"] == pytest.approx(loss_of_transformers(source), abs=1e-4)


def _train(directory, stage: str, base: str, steps: int, **changes: object) -> list[dict[str, float]]:
    return train_stage(directory, stage, base, steps, seq_length=len(TOKENS), **changes)

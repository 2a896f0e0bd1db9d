"""A new family costs one table: the toy goes through converter, Megatron's layers, training, decoder and evaluation."""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.forward import ForwardJob
from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.megatron_writer import ANY_LAYOUT, MegatronLayout
from checkpoints_convert.options import Options
from checkpoints_convert.verify import verify
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.evaluation.perplexity import BOTH, evaluate
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.models.borrowed_channel import borrowed_rows
from megatron_dmc.models.hugging_face import parse_hf_config
from megatron_dmc.training.pretrain import prepare
from tests import toy_family
from tests.short_run import train_stage, write_data

CONFIG, UNVERIFIED = toy_family.CONFIG, Options(verify=False)
TOKENS = [*range(3, 26), 96]
COMPRESSING = DMCConfig(stage="consolidate", decision_bias=0.0, window_size=4)
NEEDS_MEGATRON = pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs megatron-core")


@pytest.fixture
def source(tmp_path):
    return toy_family.write_toy(tmp_path / "hf")


def reference_of(directory) -> torch.Tensor:
    return toy_family.reference_logits(load_file(directory / "model.safetensors"), torch.tensor(TOKENS))


def decoded(directory) -> torch.Tensor:
    model = Decoder(open_source(directory))
    return model.logits(model.forward(torch.tensor(TOKENS)[:, None]))[:, 0]


def test_its_configuration(source):
    assert parse_hf_config(source) == (CONFIG, None)
    written = json.loads((source / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == ("toy", ["ToyForCausalLM"])
    for broken, told in (({"toy_width": 2}, "toy_width=2"), ({"toy_depth": 1}, "toy_depth")):
        with pytest.raises(ValueError, match=told):
            parse_hf_config(written | broken)
    del written["toy_width"]
    with pytest.raises(ValueError, match="toy_width is missing"):
        parse_hf_config(written)


@pytest.mark.parametrize("layout", [ANY_LAYOUT, MegatronLayout("torch", 2, 2, transformer_impl="local")])
def test_conversion_there_and_back(source, tmp_path, layout):
    import_checkpoint(source, tmp_path / "megatron", layout=layout, options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", options=UNVERIFIED)
    assert verify(source, tmp_path / "back", logits=False).tensors == 25
    found, expected = load_file(tmp_path / "back" / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_decoder_computes_what_the_reference_computes(source):
    torch.testing.assert_close(decoded(source), reference_of(source), rtol=1e-5, atol=1e-4)


def test_without_its_borrowed_channels_it_computes_what_zero_out_ends_with(tmp_path):
    """The norm's weight is zero there and the row stays: it is part of the mean square of the other channels."""
    trained = toy_family.write_toy(tmp_path / "trained", DMCConfig(stage="zero_out"))
    import_checkpoint(trained, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "plain", options=UNVERIFIED)
    plain, before = load_file(tmp_path / "plain" / "model.safetensors"), load_file(trained / "model.safetensors")
    changed = {name for name in before if not torch.equal(plain[name], before[name])}
    assert changed == {f"transformer.h.{layer}.attn.{which}_scale" for layer in range(2) for which in "qk"}
    assert all(torch.equal(plain[name][:-1], before[name][:-1]) and plain[name][-1] == 0 for name in changed)
    torch.testing.assert_close(decoded(trained), reference_of(tmp_path / "plain"), rtol=1e-5, atol=1e-4)


def test_both_paths_of_a_compressed_one_agree(tmp_path):
    model = Decoder(open_source(toy_family.write_toy(tmp_path / "hf", COMPRESSING)))
    result = evaluate(
        model, torch.randint(CONFIG.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0)), path=BOTH
    )
    assert result.decode.compression_ratio > 1.2
    assert result.agreement.failures() == []


@NEEDS_MEGATRON
@pytest.mark.slow
@pytest.mark.parametrize("clears", [False, True])
def test_megatrons_own_layers_compute_the_same(tmp_path, clears):
    source = toy_family.write_toy(tmp_path / "hf", DMCConfig(stage="zero_out"))
    import_checkpoint(source, tmp_path / "megatron", options=UNVERIFIED)
    export_checkpoint(tmp_path / "megatron", tmp_path / "plain", options=UNVERIFIED)
    job = ForwardJob(str(tmp_path / "megatron"), [TOKENS], 2, clears, CONFIG.vocab_size, str(tmp_path / "out"))
    (tmp_path / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    subprocess.run([sys.executable, "-m", "tests.toy_family", str(tmp_path / "job.json")], check=True)
    expected = reference_of(tmp_path / "plain" if clears else source)
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"][0], expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def base(source, tmp_path):
    """An imported model, and data whose sequences are all ``TOKENS``."""
    write_data(tmp_path, TOKENS, CONFIG.vocab_size)
    return import_checkpoint(source, tmp_path / "base", options=UNVERIFIED)


@NEEDS_MEGATRON
@pytest.mark.slow
@pytest.mark.usefixtures("base")
def test_training_and_what_comes_of_it(source, tmp_path):
    first = _train(tmp_path, "zero_out", "base", 1)
    logits = reference_of(source)
    targets = torch.tensor([*TOKENS[1:], TOKENS[0]])
    assert first[0]["lm loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), abs=1e-4)

    _train(tmp_path, "retrofit", "zero_out", 1, lr=0, min_lr=0)
    for name, expected in (("wq", 0), ("wk", 0), ("q_scale", 1), ("k_scale", 1)):
        weight = open_source(tmp_path / "retrofit").tensor(f"transformer.h.1.attn.{name}")
        assert (borrowed_rows(weight, CONFIG.head_dim) == expected).all()
    _train(tmp_path, "consolidate", "retrofit", 2)
    moved = borrowed_rows(open_source(tmp_path / "consolidate").tensor("transformer.h.1.attn.wk"), CONFIG.head_dim)
    assert (moved != 0).any(dim=1).all()

    export_checkpoint(tmp_path / "consolidate", tmp_path / "exported", options=UNVERIFIED)
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["model_type"] == "dmc_toy"
    model = Decoder(open_source(tmp_path / "exported"))
    assert evaluate(model, torch.tensor([TOKENS]), path=BOTH).agreement.failures() == []


@NEEDS_MEGATRON
@pytest.mark.slow
@pytest.mark.usefixtures("base")
def test_tensor_parallel_ranks_train_the_same_norms(tmp_path):
    usual = {"lr": 1e-2, "min_lr": 1e-2, "save": None}
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": ""}
    alone = _train(tmp_path, "zero_out", "base", 3, **usual)
    shared = _train(tmp_path, "zero_out", "base", 3, ranks=2, **usual, **parallel)
    assert len({step["lm loss"] for step in alone}) == 3
    for one, other in zip(alone, shared, strict=True):
        assert other["lm loss"] == pytest.approx(one["lm loss"], abs=1e-4)


def test_megatrons_own_model_is_refused_where_it_would_compute_something_else(base):
    with pytest.raises(ValueError, match="low_freq_factor"):
        prepare(["--dmc-stage", "off", "--pretrained-checkpoint", str(base), "--train-iters", "1", "--mock-data"])


def _train(directory, stage: str, base: str, steps: int, **changes: object) -> list[dict[str, float]]:
    return train_stage(directory, stage, base, steps, seq_length=len(TOKENS), function=toy_family.train, **changes)

"""Checkpoints and exports of earlier releases of ours still load, and hold what they held.

``written_by_release/0.1.0.tar.xz``: a tiny random Llama (``hf``), imported in both formats (``imported``, and
``legacy`` at TP 2), trained for one step in each stage (``consolidate``: the last, with --bf16 --no-save-optim) and
exported (``exported``; ``exported_plain`` from ``zero_out``).
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from checkpoints_convert.verify import verify
from megatron_dmc.checkpoint.manifest import manifest_problems
from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments
from megatron_dmc.checkpoint.source import open_source
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.training.start import find_start

STORED = Path(__file__).parent / "written_by_release" / "0.1.0.tar.xz"
SETTINGS = DMCConfig(stage="consolidate", window_size=12)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    directory = tmp_path_factory.mktemp("release")
    with tarfile.open(STORED) as archive:
        archive.extractall(directory, filter="data")
    return directory


@pytest.mark.parametrize("name", ["imported", "legacy"])
def test_conversions_hold_the_model_that_was_converted(release, name):
    assert manifest_problems(release / name / "release") == []
    assert verify(release / "hf", release / name, logits=False).tensors == 21


def test_a_trained_checkpoint_exports_as_it_did(release, tmp_path):
    saved = read_saved_arguments(release / "consolidate")
    assert (saved.dmc, saved.config.family, saved.iteration) == (SETTINGS, "llama", 1)
    export_checkpoint(release / "consolidate", tmp_path / "again", options=Options(verify=False))
    again, then = tmp_path / "again", release / "exported"
    assert (again / "model.safetensors").read_bytes() == (then / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (again, then)]
    # The settings are of a later schema, which says the same.
    assert [DMCConfig.from_dict(config.pop("dmc")) for config in configs] == [SETTINGS, SETTINGS]
    assert configs[0] == configs[1]


def test_a_stage_starts_from_the_earlier_releases_import(release):
    start = find_start(DMCConfig(stage="zero_out"), None, str(release / "imported"))
    assert start.config == open_source(release / "hf").config


@pytest.mark.parametrize(("name", "settings"), [("exported", SETTINGS), ("exported_plain", None)])
def test_exports_decode(release, name, settings):
    source = open_source(release / name)
    assert source.dmc == settings
    model = Decoder(source, dtype="float32")
    logits = model.logits(model.forward(torch.arange(12)[:, None]))
    assert logits.shape == (12, 1, 60)
    assert torch.isfinite(logits).all()


def test_transformers_computes_the_same(release):
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    import megatron_dmc.hf  # noqa: F401  registers the class

    theirs = AutoModelForCausalLM.from_pretrained(release / "exported", dtype=torch.float32)
    ours = Decoder(open_source(release / "exported"), dtype="float32")
    tokens = torch.arange(20)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(tokens[None]).logits[0], ours.logits(ours.forward(tokens[:, None]))[:, 0], rtol=1e-5, atol=1e-5
        )

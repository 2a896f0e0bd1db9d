"""Checkpoints that Megatron core 0.16, 0.17 and 0.18 themselves wrote, on TP 2 x PP 2, export to known weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from tests.checkpoints_convert.written_by_core.known_weights import known_weights

STORED = Path(__file__).parent / "written_by_core"


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2"])
def test_a_checkpoint_of_an_older_core_exports(tmp_path, version):
    export_checkpoint(STORED / version, tmp_path / "model", options=Options(verify=False))
    found, expected = load_file(tmp_path / "model" / "model.safetensors"), known_weights()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], weight), name


def test_the_known_weights_differ_from_place_to_place():
    weights = known_weights()
    assert len({tuple(weight.flatten()[:16].tolist()) for weight in weights.values()}) == len(weights)

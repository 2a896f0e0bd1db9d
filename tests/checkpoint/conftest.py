"""A small Megatron checkpoint for the readers."""

from pathlib import Path

import pytest

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_writer import MegatronLayout
from checkpoints_convert.options import Options
from tests.checkpoints_convert.models import write_model


@pytest.fixture
def torch_dist(tmp_path) -> Path:
    """The iteration directory of a ``torch_dist`` checkpoint."""
    import_checkpoint(write_model(tmp_path / "hf"), tmp_path / "megatron", options=Options(verify=False))
    return tmp_path / "megatron" / "release"


@pytest.fixture
def legacy(tmp_path) -> Path:
    """The iteration directory of a legacy checkpoint of 2 x 2 ranks."""
    layout = MegatronLayout("torch", 2, 2)
    import_checkpoint(write_model(tmp_path / "hf"), tmp_path / "legacy", layout=layout, options=Options(verify=False))
    return tmp_path / "legacy" / "release"

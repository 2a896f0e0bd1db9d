"""The guard finds a call wherever Megatron would unpickle it, and passes what Megatron writes."""

import io
import os
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_dmc.checkpoint.guard import check_checkpoint
from megatron_dmc.checkpoint.torch_dist import COMMON_STATE_KEY
from tests.checkpoints_convert.models import write_model

EXTRA_STATE_KEY = "decoder.layers.mlp.linear_fc2._extra_state/shard_1_4"


class Shell:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _replace_object(directory: Path, key: str, value: object) -> None:
    """Put another object in place of one of a ``.distcp`` file."""
    reader = FileSystemReader(directory)
    metadata = reader.read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == key)
    stream = io.BytesIO()
    torch.save(value, stream)
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "__7_0.distcp", 0, len(stream.getvalue())
    (directory / "__7_0.distcp").write_bytes(stream.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def test_whole_checkpoints_pass(torch_dist, legacy, tmp_path):
    assert check_checkpoint(torch_dist) > 20
    assert check_checkpoint(torch_dist.parent) > 20
    assert check_checkpoint(legacy) == 4
    assert check_checkpoint(write_model(tmp_path / "hf")) == 0


def _in_common_state(directory, shell):
    _replace_object(directory, COMMON_STATE_KEY, [{"args": Namespace(a=shell)}])


def _in_extra_state(directory, shell):
    _replace_object(directory, EXTRA_STATE_KEY, [shell])


def _in_bytes_of_extra_state(directory, shell):
    data = bytearray(pickle.dumps(shell))
    _replace_object(directory, EXTRA_STATE_KEY, [torch.frombuffer(data, dtype=torch.uint8)])


def _in_file_of_extra_state(directory, shell):
    stream = io.BytesIO()
    torch.save(shell, stream)
    stream.seek(0)
    _replace_object(directory, EXTRA_STATE_KEY, [stream])


def _in_pickle_of_extra_state(directory, shell):
    _replace_object(directory, EXTRA_STATE_KEY, [io.BytesIO(pickle.dumps(shell))])


def _in_metadata(directory, shell):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = {"x": [shell]}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def _in_common_pt(directory, shell):
    torch.save({"args": Namespace(), "x": shell}, directory / "common.pt")


@pytest.mark.parametrize(
    "plant",
    [
        _in_common_state,
        _in_extra_state,
        _in_bytes_of_extra_state,
        _in_file_of_extra_state,
        _in_pickle_of_extra_state,
        _in_metadata,
        _in_common_pt,
    ],
)
def test_a_call_anywhere_in_torch_dist_is_refused_by_name(torch_dist, plant):
    marker = torch_dist / "marker"
    plant(torch_dist, Shell(marker))
    with pytest.raises(ValueError, match="system"):
        check_checkpoint(torch_dist)
    assert not marker.exists()


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
@pytest.mark.parametrize("name", ["model_optim_rng.pt", "distrib_optim.pt"])
def test_a_call_in_any_file_of_a_legacy_checkpoint_is_refused(legacy, rank, name):
    marker = legacy / "marker"
    torch.save({"model": {}, "optimizer": Shell(marker)}, legacy / rank / name)
    with pytest.raises(ValueError, match="system"):
        check_checkpoint(legacy)
    assert not marker.exists()


def test_a_tensor_item_must_be_a_tensor(torch_dist):
    _replace_object(torch_dist, "decoder.final_layernorm.weight", {"x": 1})
    with pytest.raises(ValueError, match="holds a dict"):
        check_checkpoint(torch_dist)


def test_what_a_training_run_keeps_beside_its_weights_passes(torch_dist):
    """Random states, enumerations and paths, as Megatron's saved states hold them."""
    import random
    import signal

    import numpy

    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": numpy.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "exit_signal": signal.SIGTERM,
        "path": Path("/x"),
        "dtype": torch.bfloat16,
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    _replace_object(torch_dist, COMMON_STATE_KEY, [state])
    assert check_checkpoint(torch_dist) > 20

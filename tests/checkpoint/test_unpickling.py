"""Objects are built from bytes that were described, by an unpickler that finds no other name."""

import argparse
import collections
import io
import pickle
import random
import signal
from pathlib import Path

import numpy
import pytest
import torch

from megatron_dmc.checkpoint.unpickling import load, named, unpickle
from tests.checkpoint.archives import archive_of, records_of, saved
from tests.checkpoint.hostile_streams import bombs, commands

STATE = {
    "args": argparse.Namespace(a=1, dtype=torch.bfloat16, path=Path("/x"), size=torch.Size([2, 3])),
    "model": collections.OrderedDict(w=torch.arange(12.0).view(3, 4), half=torch.ones(2).half()),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "strided": torch.arange(6).view(2, 3).T,
    "empty": torch.empty(0, 3),
    "random": (random.getstate(), numpy.random.get_state(), torch.get_rng_state()),
    "signal": signal.SIGTERM,
    "set": {1, 2},
    "file": io.BytesIO(),
    "device": torch.device("cpu"),
}


def _same(ours, theirs) -> bool:
    if isinstance(theirs, torch.Tensor):
        return torch.equal(ours, theirs) and ours.stride() == theirs.stride() and ours.dtype == theirs.dtype
    if isinstance(theirs, numpy.ndarray):
        return numpy.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(theirs, io.BytesIO):
        return ours.getvalue() == theirs.getvalue()
    if isinstance(theirs, dict):
        return (
            type(ours) is type(theirs) and ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
        )
    if isinstance(theirs, (list, tuple)):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize("place", ["path", "stream"])
def test_what_torch_loads_is_built(tmp_path, place):
    (tmp_path / "state.pt").write_bytes(saved(STATE))
    source = tmp_path / "state.pt" if place == "path" else io.BytesIO(saved(STATE))
    assert _same(load(source, "cpu"), torch.load(tmp_path / "state.pt", weights_only=False))


def test_tensors_of_one_storage_stay_of_one_storage():
    whole = torch.zeros(6)
    loaded = load(io.BytesIO(saved({"all": whole, "part": whole[2:]})))
    loaded["all"][3] = 7
    assert loaded["part"][1] == 7


def test_a_stream_is_read_from_where_it_stands():
    stream = io.BytesIO(b"before" + saved([1]))
    stream.seek(6)
    assert load(stream) == [1]


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2"])
def test_what_older_cores_wrote_is_built(version):
    directory = Path(__file__).parents[1] / "checkpoints_convert" / "written_by_core" / version / "iter_0000005"
    assert load(directory / "common.pt")["args"].num_layers == 4


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0"])
def test_metadata_of_other_releases_is_built(version):
    path = Path(__file__).parent / "written_by_torch" / version / "distributed" / ".metadata"
    metadata = unpickle(path.read_bytes(), str(path))
    assert metadata.state_dict_metadata["w"].size == torch.Size([4, 6])
    assert {info.relative_path for info in metadata.storage_data.values()} == {"__0_0.distcp"}


STREAMS = {name: lambda marker, name=name: commands(marker)[name] for name in commands(Path("x"))}
STREAMS |= {name: lambda _, stream=stream: stream for name, stream in bombs().items()}


@pytest.mark.parametrize("name", STREAMS)
def test_nothing_else_is_built(tmp_path, name):
    marker = tmp_path / "marker"
    data = b"\x80\x04" + STREAMS[name](marker) + b"."
    with pytest.raises(ValueError, match="refused"):
        unpickle(data, "it")
    records = records_of(saved(None))
    records[0].data = data
    with pytest.raises(ValueError, match="refused"):
        load(io.BytesIO(archive_of(records)))
    assert not marker.exists()


def test_pickles_inside_file_objects_are_looked_at_before_anything_is_built(tmp_path):
    from tests.checkpoint.five_ways import Touch

    inner = io.BytesIO(pickle.dumps(Touch(tmp_path / "marker")))
    with pytest.raises(ValueError, match="system"):
        load(io.BytesIO(saved([inner])))


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch.storage._load_from_bytes"])
def test_the_unpickler_alone_finds_no_other_name(name):
    """Even for bytes that nobody described."""
    with pytest.raises(pickle.UnpicklingError, match=name.rpartition(".")[2]):
        named(name)


def test_a_file_that_is_no_file_is_not_opened(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a named pipe"):
        load(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a folder"):
        load(tmp_path)


def test_a_member_that_does_not_exist_here_is_told():
    with pytest.raises(ValueError, match="does not fit this release"):
        unpickle(b"\x80\x02csignal\nSignals\nM\x10\x27\x85R.", "it")

"""Files of ``torch.save`` are read without unpickling, and only if they have exactly the shape that torch writes."""

import io
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_dmc.checkpoint.torch_file import StoredTensor, read_tensor, read_torch_file


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "state.pt"
    shared = torch.arange(24, dtype=torch.float32)
    state = {
        "args": Namespace(a=1, b="x"),
        "model": {"w": shared.view(4, 6), "tail": shared[20:], "none": None},
        "bf16": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(2).half(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "strided": shared.view(4, 6).T,
        "flags": torch.tensor([True, False]),
    }
    torch.save(state, path)
    return path


def test_tensors_are_read_as_torch_reads_them(saved):
    theirs = torch.load(saved, weights_only=False)
    ours = read_torch_file(saved)
    for name in ("bf16", "half", "scalar", "empty", "parameter", "flags"):
        assert isinstance(ours[name], StoredTensor)
        assert torch.equal(ours[name].read(), theirs[name].detach())
        assert ours[name].dtype == theirs[name].dtype
    assert torch.equal(ours["model"]["w"].read(), theirs["model"]["w"])
    assert torch.equal(ours["model"]["tail"].read(), theirs["model"]["tail"])
    assert torch.equal(ours["model"]["w"].rows(1, 3).read(), theirs["model"]["w"][1:3])
    assert ours["args"].state == {"a": 1, "b": "x"}


def test_a_tensor_that_is_not_contiguous_is_described_but_not_read(saved):
    strided = read_torch_file(saved)["strided"]
    assert strided.shape == (6, 4)
    with pytest.raises(ValueError, match="contiguous"):
        strided.read()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"truncated|damaged|not a file"):
        read_torch_file(saved)


def test_the_old_format_of_torch_is_refused(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"torch >= 1\.6"):
        read_torch_file(path)


def _rewritten(source: Path, target: Path, change) -> Path:
    """Copy an archive record by record; ``change(name, data)`` gives the records to write instead."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            for name, data, compression in change(entry.filename, old.read(entry)):
                new.writestr(name, data, compress_type=compression)
    return target


STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda name, data: [(name, data, DEFLATED)], "compressed"),
        (lambda name, data: [(name, data, STORED)] * (2 if name.endswith("data.pkl") else 1), "twice"),
        (lambda name, data: [(name, data, STORED), ("state/constants.pkl", b"x", STORED)], "constants"),
        (lambda name, data: [(name, data, STORED), ("other/data.pkl", data, STORED)], "other|twice"),
        (lambda name, data: [(name.upper() if "pkl" in name else name, data, STORED)], "DATA.PKL"),
        (lambda name, data: [(name, data[:-4] if name.endswith("data/0") else data, STORED)], "announced"),
        (lambda name, data: [(name, b"big" if name.endswith("byteorder") else data, STORED)], "big-endian"),
        (lambda name, data: [] if name.endswith("data.pkl") else [(name, data, STORED)], "pickle"),
        (lambda name, data: [] if name.endswith("data/0") else [(name, data, STORED)], "announced"),
    ],
    ids=[
        "compressed",
        "duplicate",
        "TorchScript",
        "two roots",
        "case",
        "short storage",
        "big-endian",
        "no pickle",
        "no data",
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write_are_refused(saved, tmp_path, change, told):
    with pytest.raises(ValueError, match=told):
        read_torch_file(_rewritten(saved, tmp_path / "changed.pt", change))


def test_an_archive_behind_other_bytes_is_refused(saved, tmp_path):
    """Another reader could take the bytes in front for the archive."""
    path = tmp_path / "prefixed.pt"
    path.write_bytes(b"x" * 100 + saved.read_bytes())
    with pytest.raises(ValueError, match=r"start|contradicts|directory"):
        read_torch_file(path)
    path.write_bytes(saved.read_bytes() + b"trailing bytes")
    with pytest.raises(ValueError, match=r"not a file|directory"):
        read_torch_file(path)


def test_an_archive_with_a_comment_is_refused(saved):
    with zipfile.ZipFile(saved, "a") as archive:
        archive.comment = b"PK\x05\x06 another directory"
    with pytest.raises(ValueError, match=r"directory|contradicts|does not write"):
        read_torch_file(saved)


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path):
    path = tmp_path / "lie.pt"
    torch.save({"w": torch.ones(4, 4)}, path)
    data = path.read_bytes()
    shape = b"K\x04K\x04\x86"
    assert data.count(shape) == 1
    path.write_bytes(data.replace(shape, b"K\x7fK\x04\x86"))
    with pytest.raises(ValueError, match="exceeds its storage"):
        read_torch_file(path)


class _Shell:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_call_in_the_pickle_is_refused_and_not_made(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    torch.save({"model": {}, "args": _Shell(f"touch {marker}")}, path)
    with pytest.raises(ValueError, match="system"):
        read_torch_file(path)
    assert not marker.exists()


def test_reading_past_the_end_is_told(tmp_path):
    path = tmp_path / "short"
    path.write_bytes(b"1234")
    with pytest.raises(ValueError, match="truncated"):
        read_tensor(path, 2, torch.float32, (2,))


def test_torch_loads_what_we_describe(saved):
    """The strictness must not refuse what torch itself writes to a stream."""
    stream = io.BytesIO()
    torch.save([None], stream)
    saved.write_bytes(stream.getvalue())
    assert read_torch_file(saved) == [None]

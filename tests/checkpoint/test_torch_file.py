"""Files of ``torch.save`` are read without unpickling, and only if they have exactly the shape that torch writes."""

import io
import os
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.pickles import describe
from megatron_dmc.checkpoint.tensor_memory import read_tensor
from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file
from tests.checkpoint.archives import Record, archive_of, records_of


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
        assert ours[name].read_bytes() == bytes(theirs[name].detach().clone().untyped_storage())
    assert torch.equal(ours["model"]["w"].read(), theirs["model"]["w"])
    assert torch.equal(ours["model"]["tail"].read(), theirs["model"]["tail"])
    assert torch.equal(ours["model"]["w"].rows(1, 3).read(), theirs["model"]["w"][1:3])
    assert ours["args"].state == {"a": 1, "b": "x"}


def test_a_tensor_that_is_not_contiguous_is_described_but_not_read(saved):
    strided = read_torch_file(saved)["strided"]
    assert strided.shape == (6, 4)
    for read in (strided.read, strided.read_bytes):
        with pytest.raises(ValueError, match="contiguous"):
            read()


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


def _changed(path: Path, change) -> Path:
    """The archive at ``path``, put together again after ``change(records)``, which may return options."""
    records = records_of(path.read_bytes())
    options = change(records)
    path.write_bytes(archive_of(records, **(options if isinstance(options, dict) else {})))
    return path


def _named(records: list[Record], name: str) -> Record:
    return next(record for record in records if record.name.endswith("/" + name))


def _with(name: str, **changes):
    def change(records):
        for attribute, value in changes.items():
            setattr(_named(records, name), attribute, value)

    return change


def _add(name: str, data: bytes):
    return lambda records: records.append(Record(name, data))


def _remove(name: str):
    return lambda records: records.remove(_named(records, name))


def _cut(records):
    storage = _named(records, "data/0")
    storage.data = storage.data[:-4]


CENTRAL, HEADER = {"method": 10, "flags": 8, "size": 24, "checksum": 16, "place": 42}, {"method": 8, "flags": 6}
DEVIATIONS = {
    "compressed": (_with("data.pkl", entry={CENTRAL["method"]: ("H", 8)}), "compression_method 8"),
    "compressed in the header": (_with("data.pkl", local={HEADER["method"]: ("H", 8)}), "compression_method 8"),
    "encrypted": (_with("data.pkl", entry={CENTRAL["flags"]: ("H", 0x809)}), "encrypted"),
    "another size": (_with("data.pkl", entry={CENTRAL["size"]: ("L", 9)}), "compressed_size"),
    "another checksum": (_with("data.pkl", entry={CENTRAL["checksum"]: ("L", 9)}), "descriptor"),
    "another place": (_with("version", entry={CENTRAL["place"]: ("L", 0)}), "lies over another record"),
    "sizes in the header": (_with("data.pkl", local={18: ("L", 9)}), "compressed_size"),
    "another name in the header": (_with("data.pkl", local_name="state/data.pkX"), "its name"),
    "another descriptor": (_with("data.pkl", descriptor=b"PK\7\x08" + b"x" * 12), "descriptor"),
    "no descriptor": (_with("data.pkl", descriptor=b""), "descriptor"),
    "a comment of a record": (_with("data.pkl", comment=b"x"), "comment_length 1"),
    "an extra field in the directory": (_with("data.pkl", entry_extra=b"ab\0\0"), "extra_length"),
    "another extra field": (_with("data.pkl", extra=b"ab\0\0"), "extra field"),
    "padding that is not padding": (_with("data.pkl", extra=b"FB\4\0hide"), "extra field"),
    "a gap": (_with("version", before=b"x"), "does not follow"),
    "bytes in front": (_with("data.pkl", before=b"x"), "starts at 1"),
    "bytes in front of the directory": (lambda records: {"between": b"x" * 9}, "the records end at"),
    "bytes behind the directory": (lambda records: {"directory_tail": b"x"}, "belong to no entry"),
    "a record that is not listed": (_with("version", listed=False), "does not follow"),
    "a comment": (lambda records: {"comment": b"PK\5\6"}, "does not end as|do not cover"),
    "a shifted directory": (lambda records: {"shift": 1}, "do not cover"),
    "another number of entries": (lambda records: {"end": {8: ("H", 1)}}, "contradict"),
    "another directory in the old record": (lambda records: {"end": {16: ("L", 64)}}, "contradict"),
    "another end record": (lambda records: {"locator": {8: ("Q", 0)}}, "contradict"),
    "two disks": (lambda records: {"locator": {16: ("L", 2)}}, "contradict"),
    "a longer end record": (lambda records: {"end64": {4: ("Q", 60)}}, "contradict"),
    "the same name twice": (_add("state/data.pkl", b"x"), "twice"),
    "TorchScript": (_add("state/constants.pkl", b"x"), "constants"),
    "code": (_add("state/code/x.py", b"x"), "code"),
    "another root": (_add("other/data/7", b"x"), "root folders"),
    "a name in capitals": (_add("state/DATA.PKL", b"x"), "DATA.PKL"),
    "a name with a zero": (_add("state/data.pkl\0x", b"x"), "does not write"),
    "a path": (_add("../data.pkl/x", b"x"), "does not write"),
    "no pickle": (_remove("data.pkl"), "pickle"),
    "no data": (_remove("data/0"), "announced"),
    "short data": (_cut, "announced"),
    "big-endian": (_with("byteorder", data=b"big"), "big-endian"),
}


@pytest.mark.parametrize("name", DEVIATIONS)
def test_archives_that_torch_does_not_write_are_refused(saved, name):
    change, told = DEVIATIONS[name]
    with pytest.raises(ValueError, match=told):
        read_torch_file(_changed(saved, change))


def test_putting_together_again_changes_nothing(saved):
    before = saved.read_bytes()
    assert _changed(saved, lambda records: None).read_bytes() == before


def test_zips_of_other_writers_are_refused(saved, tmp_path):
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(tmp_path / "other.pt", "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    with pytest.raises(ValueError, match="not a file of torch.save"):
        read_torch_file(tmp_path / "other.pt")


@pytest.mark.parametrize("name", ["state.pt", "stream.pt"])
@pytest.mark.parametrize("version", ["2.1.2", "2.5.1", "2.13.0", "2.15.0"])
def test_archives_of_other_releases_are_read(version, name):
    path = Path(__file__).parent / "written_by_torch" / version / name
    described, loaded = read_torch_file(path), torch.load(path, weights_only=False)
    assert described["args"].state["name"] == "llama"
    for key, tensor in loaded["model"].items():
        assert torch.equal(described["model"][key].read(), tensor)
    assert described["empty"].shape == (0, 3)


@pytest.mark.parametrize("version", ["2.13.0", "2.15.0"])
def test_metadata_of_other_releases_is_described(version):
    path = Path(__file__).parent / "written_by_torch" / version / "distributed" / ".metadata"
    assert describe(path.read_bytes(), str(path), ALLOWED).state["state_dict_metadata"].keys() == {"w", "half", "args"}


def test_an_archive_beyond_four_gibibytes_is_read(tmp_path):
    """Sizes and places that need zip64 fields; the data is a hole in the file."""
    path = tmp_path / "large.pt"
    with torch._subclasses.fake_tensor.FakeTensorMode():
        state = {"large": torch.empty((1 << 32) + 100, dtype=torch.uint8), "behind": torch.empty(3)}
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(state, path)
    described = read_torch_file(path)
    assert described["large"].nbytes == (1 << 32) + 100
    assert described["behind"].offset > 1 << 32
    assert described["behind"].read().shape == (3,)


def test_bytes_around_an_archive_are_refused(saved):
    whole = saved.read_bytes()
    for data in (b"x" * 100 + whole, whole + b"trailing bytes", whole + whole):
        saved.write_bytes(data)
        with pytest.raises(ValueError, match=r"not a file|do not cover"):
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

"""What torch, numpy and Transformer Engine would build from files is built by ours; a place that moved is refused."""

import io
import pickle
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem

from megatron_dmc.seam import unpickling

SAID: list[tuple] = []


def _recorded(name, answer=None):
    def act(*arguments):
        SAID.append((name, *arguments))
        return answer

    return act


@pytest.fixture
def builders(monkeypatch):
    """Builders that record what they are asked; everything that is routed is put back afterwards."""
    SAID.clear()
    own = torch.storage._load_from_bytes
    places = [(torch, "load"), (torch.serialization, "load"), (torch.storage, "_load_from_bytes"), (numpy, "load")]
    places += [(sys.modules[own.__module__], own.__name__), (filesystem, "pickle")]
    places += [(filesystem.FileSystem, "create_stream")]
    for module, name in places:
        monkeypatch.setattr(module, name, getattr(module, name))
    return unpickling.Builders(
        load=_recorded("load", "loaded"),
        unpickle=_recorded("unpickle", types.SimpleNamespace(storage_meta=types.SimpleNamespace())),
        open_file=lambda path: SAID.append(("open", path)) or open(path, "rb"),
        check_array=_recorded("array"),
        check_choice=_recorded("choice"),
    )


def test_torch_load_is_ours_whatever_it_is_asked(builders, tmp_path):
    unpickling._route_torch_load(builders)
    assert torch.load("x", weights_only=False, mmap=True) == "loaded"
    assert torch.serialization.load("x", "cpu") == "loaded"
    assert SAID == [("load", "x", None), ("load", "x", "cpu")]
    with pytest.raises(ValueError, match="pickle module"):
        torch.load("x", pickle_module=pickle)


def test_what_our_processes_send_each_other_is_not_touched(builders):
    unpickling._route_torch_load(builders)
    sent = pickle.dumps({"w": torch.arange(3)})
    assert pickle.loads(sent)["w"].tolist() == [0, 1, 2]
    assert SAID == []


def test_metadata_is_ours(builders, tmp_path):
    unpickling._route_metadata(builders)
    (tmp_path / ".metadata").write_bytes(b"bytes")
    FileSystemReader(tmp_path).read_metadata()
    assert [("open", tmp_path / ".metadata"), ("unpickle", b"bytes", str(tmp_path / ".metadata"))] == SAID


def test_writing_a_distributed_checkpoint_goes_on(builders, tmp_path):
    from torch.distributed.checkpoint import save

    unpickling._route_metadata(builders)
    save({"w": torch.ones(2)}, checkpoint_id=tmp_path / "saved")
    assert (tmp_path / "saved" / ".metadata").is_file()
    assert SAID == []


def test_arrays_are_looked_at_and_never_unpickled(builders, tmp_path):
    unpickling._route_arrays(builders)
    numpy.save(tmp_path / "objects.npy", numpy.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        numpy.load(tmp_path / "objects.npy", allow_pickle=True)
    assert [("array", tmp_path / "objects.npy")] == SAID


def test_routing_twice_routes_to_the_last(builders):
    unpickling._route_torch_load(builders)
    unpickling._route_torch_load(builders)
    torch.load(io.BytesIO())
    assert len(SAID) == 1


def test_transformer_engine_unpickles_through_ours(builders, monkeypatch):
    package = types.ModuleType("transformer_engine")
    package.__spec__ = types.SimpleNamespace()
    monkeypatch.setitem(sys.modules, "transformer_engine", package)
    modules = {name: types.ModuleType(name) for name in unpickling._TRANSFORMER_ENGINE}
    for name, module in modules.items():
        module.pickle = pickle
        monkeypatch.setitem(sys.modules, name, module)
    unpickling._route_transformer_engine(builders)
    for module in modules.values():
        module.pickle.loads(b"state")
    assert SAID == [("unpickle", b"state", "a pickle")] * 2


@pytest.mark.parametrize(
    ("route", "module", "name"),
    [
        (unpickling._route_torch_load, torch.storage, "_load_from_bytes"),
        (unpickling._route_metadata, filesystem, "FileSystemReader"),
        (unpickling._route_arrays, numpy, "load"),
    ],
)
def test_a_place_that_moved_is_refused(builders, monkeypatch, route, module, name):
    monkeypatch.setattr(unpickling, "check_version", lambda: "0.99")
    monkeypatch.delattr(module, name)
    with pytest.raises(ImportError, match=rf"{module.__name__} has no {name}.*0\.99"):
        route(builders)


def test_a_new_way_of_reading_metadata_is_refused(builders, monkeypatch):
    monkeypatch.setattr(FileSystemReader, "read_metadata", lambda self: None)
    with pytest.raises(ImportError, match="new way"):
        unpickling._route_metadata(builders)


def test_the_pickle_module_of_a_reader_still_writes(builders):
    checked = unpickling._checked_pickle(builders)
    assert pickle.loads(checked.dumps([1])) == [1]
    assert not hasattr(checked, "Unpickler")
    checked.load(io.BytesIO(b"x"))
    assert SAID == [("unpickle", b"x", "a pickle")]


def test_megatron_loads_arrays_through_numpy():
    """The index cache: no other way than ``numpy.load``, which is routed."""
    import importlib.util

    folder = Path(importlib.util.find_spec("megatron.core").origin).parent / "datasets"
    for path in folder.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "import load" not in text, path
        assert "np.load(" not in text, path

"""Pickles are described as data; whatever they would import or call is refused by name and never happens."""

import argparse
import collections
import os
import pickle
import pickletools
import struct
import sys

import pytest

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.pickles import Name, Record, describe


class Attack:
    """Reduces to any call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _global(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


PLAIN = [
    None,
    True,
    [1, 2.5, "text", b"bytes", 1 << 70, -1],
    {"a": (1, 2), "b": {3, 4}, "c": frozenset({5})},
    ((), [], {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
    collections.OrderedDict(a=1),
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_plain_values_are_what_pickle_makes_of_them(value, protocol):
    assert describe(pickle.dumps(value, protocol), "it", ALLOWED) == value


def test_objects_become_records():
    described = describe(pickle.dumps(argparse.Namespace(a=1, b=[2])), "it", ALLOWED)
    assert isinstance(described, Record)
    assert (described.kind, described.state) == ("argparse.Namespace", {"a": 1, "b": [2]})


def test_the_state_dict_of_a_module_has_metadata():
    state = collections.OrderedDict(weight=1)
    state._metadata = {"": {"version": 1}}
    assert describe(pickle.dumps(state, 2), "it", ALLOWED) == {"weight": 1}


def test_shared_values_stay_shared():
    inner = [1]
    described = describe(pickle.dumps([inner, inner]), "it", ALLOWED)
    assert described[0] is described[1]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    ("function", "told"),
    [
        (os.system, f"{os.name}.system"),
        (eval, "eval"),
        (getattr, "getattr"),
        (__import__, "__import__"),
        (open, "open"),
    ],
    ids=["os.system", "eval", "getattr", "import", "open"],
)
def test_calls_of_anything_else_are_refused_by_name(tmp_path, protocol, function, told):
    marker = tmp_path / "marker"
    data = pickle.dumps({"args": [Attack(function, f"touch {marker}")]}, protocol)
    with pytest.raises(ValueError, match=told.replace("nt.", "")):
        describe(data, "checkpoint", ALLOWED)
    assert not marker.exists()


HOSTILE = {
    "dotted name": (
        b"\x80\x04" + b"\x8c\x05torch\x8c\x09os.system\x93" + b"(X\x01\x00\x00\x00xtR.",
        r"torch\.os\.system",
    ),
    "import of a module attribute": (_global("torch.serialization", "os") + b".", r"torch\.serialization\.os"),
    "names with spaces": (_global("os system", "x") + b".", r"os\.system x"),
    "two names in one": (_global("collections", "OrderedDict x") + b".", "OrderedDict x"),
    "foreign callable in a rebuild": (
        _global("torch._tensor", "_rebuild_from_type_v2") + b"(" + _global("os", "system") + b"tR.",
        "_rebuild_from_type_v2",
    ),
    "nested pickle of a storage": (_global("torch.storage", "_load_from_bytes") + b"(tR.", "_load_from_bytes"),
    "TorchScript": (_global("torch.jit._pickle", "build_intlist") + b".", "build_intlist"),
    "call of a number type": (_global("torch", "float32") + b")R.", r"torch\.float32"),
    "call of a call": (_global("argparse", "Namespace") + b")R)R.", "argparse.Namespace"),
    "state of a class": (_global("argparse", "Namespace") + b"}" + _text("x") + b"K\x01sb.", "argparse.Namespace"),
    "slots of a class": (_global("argparse", "Namespace") + b"N}" + _text("x") + b"K\x01s\x86b.", "argparse.Namespace"),
    "state of a list": (b"]}b.", "a list"),
    "state of an ordered dict": (
        _global("collections", "OrderedDict") + b")R}" + _text("keys") + b"K\x01sb.",
        "a state of an OrderedDict",
    ),
    "items of an object": (_global("argparse", "Namespace") + b")R" + _text("x") + b"K\x01s.", "argparse.Namespace"),
    "appending to an object": (_global("argparse", "Namespace") + b")RK\x01a.", "argparse.Namespace"),
    "INST": (b"(ios\nsystem\n.", "INST"),
    "OBJ": (b"(" + _global("argparse", "Namespace") + b"o.", "OBJ"),
    "extension registry": (b"\x82\x01.", "EXT1"),
    "buffer": (b"\x97.", "NEXT_BUFFER"),
    "persistent id": (b"K\x01Q.", "persistent"),
    "text persistent id": (b"Pos\n.", "PERSID"),
    "keyword construction": (
        b"\x80\x04" + _global("argparse", "Namespace") + b")}" + _text("x") + b"K\x01s\x92.",
        "keyword",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_streams_are_refused(name):
    data, told = HOSTILE[name]
    with pytest.raises(ValueError, match=told):
        describe(data, "checkpoint", ALLOWED)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"0.",
        b"(.",
        b"t.",
        b"h\x00.",
        b"(t",
        b"\x80\x04]a.",
        b"K\x01K\x02s.",
        b"}(K\x01u.",
        b"cx\n",
        b"\xff.",
    ],
)
def test_damaged_streams_are_told(data):
    with pytest.raises(ValueError, match=r"damaged|refused"):
        describe(data, "checkpoint", ALLOWED)


def test_the_message_does_not_repeat_what_a_hostile_file_says_at_length():
    data = pickle.dumps([["x" * 100_000]])[:-1] + b")R."
    with pytest.raises(ValueError, match="a list") as refusal:
        describe(data, "checkpoint", ALLOWED)
    assert len(str(refusal.value)) < 500


def test_no_allowed_name_is_renamed_by_pickle_into_another():
    """Protocols below 3 map the names of Python 2: an allowed name must not become one that is not."""
    import _compat_pickle

    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        renamed_module, renamed = _compat_pickle.NAME_MAPPING.get(
            (module, attribute), (_compat_pickle.IMPORT_MAPPING.get(module, module), attribute)
        )
        assert f"{renamed_module}.{renamed}" in ALLOWED


def test_every_allowed_name_that_exists_is_a_type_or_one_of_the_known_functions():
    functions = {"encode", "_get_layout", "_reconstruct"}
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        found = getattr(sys.modules.get(module), attribute, None)
        if found is not None and callable(found) and not isinstance(found, type):
            assert attribute in functions, name


def test_names_that_may_only_be_mentioned():
    described = describe(pickle.dumps(__import__("torch").float32), "it", ALLOWED)
    assert isinstance(described, Name)
    assert described.name == "torch.float32"


def test_nothing_is_imported(monkeypatch):
    data = pickle.dumps(argparse.Namespace(a=1))
    monkeypatch.setattr("builtins.__import__", _fail)
    assert describe(data, "it", ALLOWED).state == {"a": 1}


def _fail(*arguments, **keywords):
    raise AssertionError(f"import of {arguments[0]}")


def test_a_deep_stream_does_not_exhaust_the_stack():
    data = pickletools.optimize(b"\x80\x04" + b"]" * 50_000 + b"a" * 49_999 + b".")
    with pytest.raises(ValueError, match="nest beyond measure"):
        describe(data, "it", ALLOWED)

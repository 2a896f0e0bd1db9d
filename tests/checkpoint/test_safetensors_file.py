"""Headers of safetensors files: those of the library are read, lies are refused."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_dmc.checkpoint.safetensors_file import DTYPES, read_safetensors_header


def _write(path, header, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_what_the_library_writes_is_read(tmp_path_factory, tensors):
    path = tmp_path_factory.mktemp("safetensors") / "a.safetensors"
    made = {name: torch.zeros(shape).to(DTYPES[dtype].dtype) for name, (dtype, shape) in tensors.items()}
    save_file(made, path, metadata={"format": "pt"})
    header = read_safetensors_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == made.keys()
    for name, tensor in made.items():
        assert torch.equal(header.tensors[name].read(), tensor)


def _entry(begin, end, shape=(2,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


LIES = {
    "gap": ({"a": _entry(0, 8), "b": _entry(12, 20)}, 20, "starts at byte"),
    "overlap": ({"a": _entry(0, 8), "b": _entry(4, 12)}, 12, "starts at byte"),
    "hole at the start": ({"a": _entry(8, 16)}, 16, "starts at byte"),
    "beyond the file": ({"a": _entry(0, 8)}, 4, "damaged or truncated"),
    "bytes that nobody owns": ({"a": _entry(0, 8)}, 12, "damaged or truncated"),
    "size against shape": ({"a": _entry(0, 8, (3,))}, 8, "needs another number"),
    "negative offset": ({"a": _entry(-8, 0)}, 8, "not counts"),
    "reversed offsets": ({"a": _entry(8, 0)}, 8, "data_offsets"),
    "huge shape": ({"a": _entry(0, 8, (1 << 62, 1 << 62))}, 8, "not counts"),
    "many dimensions": ({"a": _entry(0, 8, (1,) * 50)}, 8, "short lists"),
    "boolean size": ({"a": _entry(0, 4, (True,))}, 4, "not counts"),
    "float offset": ({"a": _entry(0, 8.0)}, 8, "not counts"),
    "unknown type": ({"a": _entry(0, 8, dtype="F128")}, 8, "F128"),
    "type that is no text": ({"a": _entry(0, 8, dtype=["F32"])}, 8, "type"),
    "extra field": ({"a": _entry(0, 8, extra=1)}, 8, "needs dtype"),
    "missing field": ({"a": {"dtype": "F32"}}, 8, "needs dtype"),
    "entry that is no object": ({"a": 1}, 8, "needs dtype"),
    "metadata that is no text": ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
    "name twice": (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}', 0, "twice"),
    "not JSON": (b"{", 0, "not valid JSON"),
    "deep JSON": (b"[" * 100_000, 0, "not valid JSON"),
    "a list": (b"[]", 0, "JSON object"),
    "NaN": (b'{"a": NaN}', 0, "NaN"),
    "not UTF-8": (b"\xff\xff", 0, "not valid JSON"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_header_that_lies_is_refused(tmp_path, name):
    header, data_bytes, told = LIES[name]
    _write(tmp_path / "a.safetensors", header, b"\0" * data_bytes)
    with pytest.raises(ValueError, match=told):
        read_safetensors_header(tmp_path / "a.safetensors")


@pytest.mark.parametrize("length", [1 << 63, 100_000_001, 50])
def test_an_announced_length_that_cannot_be(tmp_path, length):
    _write(tmp_path / "a.safetensors", {}, length=length)
    with pytest.raises(ValueError, match="announced"):
        read_safetensors_header(tmp_path / "a.safetensors")


def test_short_and_missing_files(tmp_path):
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(ValueError, match="truncated"):
        read_safetensors_header(tmp_path / "short")
    with pytest.raises(ValueError, match="missing"):
        read_safetensors_header(tmp_path / "absent")

"""What ``torch.save`` writes: a zip of one pickle and the bytes of its tensors, read without unpickling.

The zip must have exactly the shape that torch gives it (stored, not compressed; one directory; no gaps that another
reader could take for something else), so that what is checked here is what torch opens later.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from megatron_dmc.checkpoint.allowed import ALLOWED, STORAGE_DTYPES
from megatron_dmc.checkpoint.bounded import read_exactly
from megatron_dmc.checkpoint.pickles import Name, describe

PICKLE_BYTES_LIMIT = 1 << 28
"""The pickle of a file: names, shapes and settings, never tensor data."""

_LOCAL_HEADER_BYTES = 30
_LOCAL_HEADER_MAGIC = b"PK\x03\x04"
_END_RECORD_BYTES = 22
_END_RECORD_MAGIC = b"PK\x05\x06"
_RECORD = re.compile(
    r"(?P<root>[^/]+)/(data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/(?P<key>[0-9]+))"
)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that is not read yet: where its bytes are, and what they mean."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, last: int) -> StoredTensor:
        """Entries ``first .. last`` of the first axis."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        shape = (last - first, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + first * row_bytes, shape=shape)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        if not self.contiguous:
            raise ValueError(f"{self.path} holds a tensor of shape {self.shape} that is not contiguous")
        return read_tensor(self.path, self.offset, self.dtype, self.shape)


def read_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """``shape`` elements at ``offset`` of a file, in memory of their own; the file's pages are not kept in memory.

    Raises:
        ValueError: the file ends before.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() == 0:
        return tensor
    view = tensor_memory(tensor)
    with open(path, "rb", buffering=0) as stream:
        stream.seek(offset)
        done = 0
        while done < len(view):
            count = stream.readinto(view[done:])
            if not count:
                raise ValueError(f"{path} is truncated: it ends inside a tensor at byte {offset + done}")
            done += count
        os.posix_fadvise(stream.fileno(), offset, done, os.POSIX_FADV_DONTNEED)
    return tensor


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place; the tensor lives as long as the view.

    Not through numpy, which would pin the storage: a converter wants to free it early.
    """
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def read_torch_file(path: Path, names: Mapping[str, Callable[..., Any] | None] = ALLOWED) -> Any:
    """The content of a file of ``torch.save``, tensors as :class:`StoredTensor`.

    Raises:
        ValueError: not such a file, damaged, or it holds an object that no checkpoint needs (named).
    """
    with open(path, "rb") as stream:
        return read_torch_item(path, stream, 0, os.fstat(stream.fileno()).st_size, str(path), names)


def read_torch_item(
    path: Path,
    stream: BinaryIO,
    start: int,
    length: int,
    what: str,
    names: Mapping[str, Callable[..., Any] | None] = ALLOWED,
) -> Any:
    """As :func:`read_torch_file`, for the bytes ``start .. start + length`` of an open file."""
    records = _records(cast(BinaryIO, _Slice(stream, start, length)), length, what)
    offset, size = records.pop("data.pkl", (0, -1))
    if not 0 <= size <= PICKLE_BYTES_LIMIT:
        raise ValueError(f"{what}: a pickle of at most {PICKLE_BYTES_LIMIT} bytes is expected, it has {size}")
    if "byteorder" in records:
        position, count = records["byteorder"]
        if read_exactly(stream, start + position, min(count, 16), what) != b"little":
            raise ValueError(f"{what} was written on a big-endian machine: write it again on a little-endian one")
    load = _StorageLoader(path, start, records)
    allowed = {
        **names,
        "torch._utils._rebuild_tensor_v2": load.tensor,
        "torch._utils._rebuild_parameter": load.parameter,
    }
    return describe(read_exactly(stream, start + offset, size, what), what, allowed, load.storage)


class _StorageLoader:
    """Stands for torch's storages and for the function that makes tensors of them."""

    def __init__(self, path: Path, start: int, records: Mapping[str, tuple[int, int]]) -> None:
        self.path = path
        self.start = start
        self.records = records

    def storage(self, identity: Any) -> StoredTensor:
        kind, storage_type, key, _, count = identity
        dtype = STORAGE_DTYPES.get(storage_type.name) if isinstance(storage_type, Name) else None
        if kind != "storage" or dtype is None or not isinstance(key, str) or type(count) is not int or count < 0:
            raise ValueError(f"not the description of a storage: {kind!r}, {key!r}")
        offset, size = self.records.get(f"data/{key}", (0, -1))
        if size != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {size} bytes where {count} elements of {dtype} are announced")
        return StoredTensor(self.path, self.start + offset, dtype, (count,))

    def tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
    ) -> StoredTensor:
        if not isinstance(storage, StoredTensor) or len(storage.shape) != 1 or hooks != {}:
            raise ValueError("a tensor without a storage, or with hooks")
        if any(type(size) is not int or size < 0 for size in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError(f"a tensor at {offset} of shape {shape} and stride {stride}")
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and offset + reach > storage.shape[0]:
            raise ValueError(f"a tensor of shape {shape} at {offset} exceeds its storage of {storage.shape[0]}")
        position = storage.offset + offset * storage.dtype.itemsize
        return StoredTensor(storage.path, position, storage.dtype, tuple(shape), _is_contiguous(shape, stride))

    def parameter(self, data: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
        if not isinstance(data, StoredTensor) or hooks != {}:
            raise ValueError("a parameter without a tensor, or with hooks")
        return data


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """As torch sees it: the stride of an axis of length 1 does not count."""
    if not math.prod(shape):
        return True
    needed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(size == 1 or step == wanted for size, step, wanted in zip(shape, stride, needed, strict=True))


def _records(stream: BinaryIO, length: int, what: str) -> dict[str, tuple[int, int]]:
    """Offset and size of every record of torch's zip, by name without the root folder."""
    stream.seek(max(length - _END_RECORD_BYTES, 0))
    if stream.read(len(_END_RECORD_MAGIC)) != _END_RECORD_MAGIC:
        raise ValueError(
            f"{what} is not a file of torch.save (torch >= 1.6), or is truncated: no zip directory at its end"
        )
    try:
        archive = zipfile.ZipFile(stream)
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} is not a file of torch.save (torch >= 1.6), or is truncated: {error}") from error
    records: dict[str, tuple[int, int]] = {}
    roots, end = set(), 0
    for entry in entries:
        match = _RECORD.fullmatch(entry.orig_filename)
        if match is None or entry.orig_filename != entry.filename:
            raise ValueError(f"{what} holds {entry.orig_filename!r}, which torch.save does not write")
        name = entry.filename.split("/", 1)[1]
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 or entry.compress_size != entry.file_size:
            raise ValueError(f"{what}: {entry.filename} is compressed or encrypted, which torch.save does not do")
        if name in records:
            raise ValueError(f"{what} holds {entry.filename!r} twice")
        # Only the first record starts at the very beginning; each lies behind the one before it.
        if entry.header_offset < end or (not records and entry.header_offset != 0):
            raise ValueError(f"{what}: {entry.filename} overlaps another record or does not start the file")
        offset = _data_offset(stream, entry, what)
        end = offset + entry.file_size
        records[name] = (offset, entry.file_size)
        roots.add(match["root"])
    if len(roots) != 1 or archive.comment or end > archive.start_dir or archive.start_dir > length:
        raise ValueError(f"{what} has a zip directory that torch.save does not write")
    return records


def _data_offset(stream: BinaryIO, entry: zipfile.ZipInfo, what: str) -> int:
    header = read_exactly(stream, entry.header_offset, _LOCAL_HEADER_BYTES, what)
    name_length, extra_length = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    name = stream.read(name_length)
    if header[:4] != _LOCAL_HEADER_MAGIC or name != entry.orig_filename.encode() or header[8:10] != b"\0\0":
        raise ValueError(f"{what}: the header of {entry.filename} contradicts the directory of the file")
    return entry.header_offset + _LOCAL_HEADER_BYTES + name_length + extra_length


class _Slice(io.RawIOBase):
    """A range of an open file, as a file of its own."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._position = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("negative position")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(self._length - self._position, 0)
        self._stream.seek(self._start + self._position)
        data = self._stream.read(left if size is None or size < 0 else min(size, left))
        self._position += len(data)
        return data

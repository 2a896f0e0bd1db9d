"""What ``torch.save`` writes: a zip of one pickle and the bytes of its tensors, read without unpickling.

``torch_zip`` accepts the zip only as torch's writer makes it, so that no other reader can take it for something else.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_dmc.checkpoint.allowed import ALLOWED, STORAGE_DTYPES
from megatron_dmc.checkpoint.bounded import read_exactly
from megatron_dmc.checkpoint.pickles import Name, Refused, describe
from megatron_dmc.checkpoint.torch_zip import Extent, read_archive
from megatron_dmc.support.element_types import ElementType
from megatron_dmc.support.files import open_regular

if TYPE_CHECKING:
    import torch

PICKLE_BYTES_LIMIT = 1 << 28
"""The pickle of a file: names, shapes and settings, never tensor data."""

_DIMENSIONS_LIMIT = 16
_DEVICE = re.compile(r"[a-z]{2,20}(:[0-9]{1,4})?")
_SMALL_ARCHIVE = 1 << 16
"""Bytes below which an archive is read as a whole rather than header by header."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file that is not read yet: where its bytes are, and what they mean."""

    path: Path
    offset: int
    element_type: ElementType
    shape: tuple[int, ...]
    contiguous: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """The type of its elements, as torch names it."""
        return self.element_type.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * self.element_type.itemsize

    def rows(self, first: int, last: int) -> StoredTensor:
        """Entries ``first .. last`` of the first axis."""
        row_bytes = math.prod(self.shape[1:]) * self.element_type.itemsize
        shape = (last - first, *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + first * row_bytes, shape=shape)

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own."""
        from megatron_dmc.checkpoint.tensor_memory import read_tensor  # loads torch

        self._require_contiguous()
        return read_tensor(self.path, self.offset, self.dtype, self.shape)

    def read_bytes(self) -> bytes:
        """The bytes of its elements, for what is no tensor but is stored as one."""
        self._require_contiguous()
        with open_regular(self.path) as stream:
            return read_exactly(stream, self.offset, self.nbytes, str(self.path))

    def _require_contiguous(self) -> None:
        if not self.contiguous:
            raise ValueError(f"{self.path} holds a tensor of shape {self.shape} that is not contiguous")


def read_torch_file(path: Path, names: Mapping[str, Callable[..., Any] | None] = ALLOWED) -> Any:
    """The content of a file of ``torch.save``, tensors as :class:`StoredTensor`.

    Raises:
        ValueError: not such a file, damaged, or it holds an object that no checkpoint needs (named).
    """
    with open_regular(path) as stream:
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
    return open_archive(path, stream, start, length, what).describe(names)


@dataclass(frozen=True)
class Archive:
    """An archive of ``torch.save`` whose pickle is in memory, and whose tensors are in its file.

    Attributes:
        path: of the file; ``start``: where in it the archive begins.
        pickle: the bytes of its pickle, read once.
    """

    path: Path
    start: int
    what: str
    records: Mapping[str, Extent]
    pickle: bytes

    def describe(self, names: Mapping[str, Callable[..., Any] | None] = ALLOWED) -> Any:
        """Its content, tensors as :class:`StoredTensor`."""
        load = _StorageLoader(self.path, self.start, self.records)
        allowed = {
            **names,
            "torch._utils._rebuild_tensor_v2": load.tensor,
            "torch._utils._rebuild_parameter": load.parameter,
        }
        return describe(self.pickle, self.what, allowed, load.storage)


def open_archive(path: Path, stream: BinaryIO, start: int, length: int, what: str) -> Archive:
    """Check the zip of an archive, the bytes ``start .. start + length`` of an open file, and read its pickle.

    Raises:
        ValueError: not exactly what torch's writer makes, or written on a big-endian machine.
    """
    read = _reader(stream, start, length, what)
    records = read_archive(read, length, what)
    offset, size = records.get("data.pkl", (0, -1))
    if not 0 <= size <= PICKLE_BYTES_LIMIT:
        raise ValueError(f"{what}: a pickle of at most {PICKLE_BYTES_LIMIT} bytes is expected, it has {size}")
    if "byteorder" in records:
        position, count = records["byteorder"]
        if read(position, min(count, 16)) != b"little":
            raise ValueError(f"{what} was written on a big-endian machine: write it again on a little-endian one")
    return Archive(path, start, what, records, read(offset, size))


def _reader(stream: BinaryIO, start: int, length: int, what: str) -> Callable[[int, int], bytes]:
    """Reads parts of ``start .. start + length``, never beyond; a small range is read once, as a whole."""
    whole = read_exactly(stream, start, length, what) if length <= _SMALL_ARCHIVE else None

    def read(offset: int, count: int) -> bytes:
        if offset + count > length:
            raise ValueError(f"{what} is truncated: {count} bytes expected at {offset}, it has {length}")
        return read_exactly(stream, start + offset, count, what) if whole is None else whole[offset : offset + count]

    return read


class _StorageLoader:
    """Stands for torch's storages and for the function that makes tensors of them."""

    def __init__(self, path: Path, start: int, records: Mapping[str, Extent]) -> None:
        self.path = path
        self.start = start
        self.records = records

    def storage(self, identity: Any) -> StoredTensor:
        if type(identity) is not tuple or len(identity) != 5:
            raise Refused("a persistent id that is not one of a storage")
        kind, storage_type, key, location, count = identity
        element_type = STORAGE_DTYPES.get(storage_type.name) if isinstance(storage_type, Name) else None
        if kind != "storage" or element_type is None or type(key) is not str or type(count) is not int or count < 0:
            raise Refused("a persistent id that is not one of a storage")
        if type(location) is not str or not _DEVICE.fullmatch(location):
            raise Refused("a storage on something else than a device")
        offset, size = self.records.get(f"data/{key}", (0, -1))
        if size != count * element_type.itemsize:
            raise ValueError(f"storage {key} has {size} bytes where {count} elements of {element_type} are announced")
        return StoredTensor(self.path, self.start + offset, element_type, (count,))

    def tensor(
        self, storage: Any, offset: Any, shape: Any, stride: Any, requires_grad: Any, hooks: Any
    ) -> StoredTensor:
        if not isinstance(storage, StoredTensor) or len(storage.shape) != 1 or type(requires_grad) is not bool:
            raise Refused("a tensor without a storage")
        if not isinstance(hooks, dict) or hooks:
            raise Refused("a tensor with hooks")
        if not all(_are_sizes(sizes) for sizes in ((offset,), shape, stride)) or len(shape) != len(stride):
            raise Refused("a tensor whose place, shape and stride are not numbers")
        reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if math.prod(shape) and max(offset + reach, math.prod(shape)) > storage.shape[0]:
            raise Refused(f"a tensor of shape {shape} at {offset} exceeds its storage of {storage.shape[0]}")
        position = storage.offset + offset * storage.element_type.itemsize
        return StoredTensor(storage.path, position, storage.element_type, tuple(shape), _is_contiguous(shape, stride))

    def parameter(self, data: Any, requires_grad: Any, hooks: Any) -> StoredTensor:
        if not isinstance(data, StoredTensor) or type(requires_grad) is not bool:
            raise Refused("a parameter without a tensor")
        if not isinstance(hooks, dict) or hooks:
            raise Refused("a parameter with hooks")
        return data


def _are_sizes(values: Any) -> bool:
    if type(values) is not tuple or len(values) > _DIMENSIONS_LIMIT:
        return False
    return all(type(value) is int and 0 <= value < 1 << 48 for value in values)


def _is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """As torch sees it: the stride of an axis of length 1 does not count."""
    if not math.prod(shape):
        return True
    needed = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return all(size == 1 or step == wanted for size, step, wanted in zip(shape, stride, needed, strict=True))

"""Megatron's ``torch_dist`` checkpoints, read chunk by chunk without unpickling and without a process group.

An iteration directory holds ``metadata.json``, ``.metadata`` (a pickle that says which chunk of which tensor lies
where) and ``.distcp`` files of chunks, each written by ``torch.save``. Any layout of tensor and pipeline
parallelism only changes how the tensors are cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_dmc.checkpoint.allowed import ALLOWED, DTYPES
from megatron_dmc.checkpoint.bounded import confined
from megatron_dmc.checkpoint.pickles import Name, Record, describe
from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file, read_torch_item
from megatron_dmc.support.element_types import ElementType
from megatron_dmc.support.files import open_regular, read_bounded, read_json

if TYPE_CHECKING:
    import torch

METADATA_BYTES_LIMIT = 1 << 30
COMMON_STATE_KEY = "common_state/shard_0_1"
_METADATA = "torch.distributed.checkpoint.metadata."


@dataclass(frozen=True)
class Item:
    """A range of a ``.distcp`` file: what one ``torch.save`` wrote."""

    path: Path
    offset: int
    length: int

    def describe(self, stream: BinaryIO) -> Any:
        """Its content, tensors as :class:`StoredTensor`; ``stream`` is the open file."""
        return read_torch_item(self.path, stream, self.offset, self.length, f"{self.path} at {self.offset}")

    def open(self) -> Any:
        """As :meth:`describe`, opening the file."""
        with open_regular(self.path) as stream:
            return self.describe(stream)


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: its place in the whole and in the files."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    item: Item

    def end(self, axis: int) -> int:
        """Where the block ends on an axis."""
        return self.offsets[axis] + self.sizes[axis]


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor of the checkpoint, cut into chunks that cover it exactly once."""

    name: str
    element_type: ElementType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TorchDistCheckpoint:
    """One iteration directory.

    Raises:
        ValueError: damaged metadata, chunks that do not cover their tensor, a file that is missing, too short or
            outside the directory, or a pickle that mentions what no checkpoint needs.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        backend = read_json(directory / "metadata.json", 1 << 16)
        if backend.get("sharded_backend") != "torch_dist":
            raise ValueError(
                f"{directory}: sharded_backend={backend.get('sharded_backend')!r}; only torch_dist is read"
            )
        path = directory / ".metadata"
        data = read_bounded(path, METADATA_BYTES_LIMIT)
        try:
            self._parse(_fields(describe(data, str(path), ALLOWED), "Metadata"))
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def _parse(self, metadata: dict[str, Any]) -> None:
        items = {(fqn, offset): item for fqn, offset, item in self._items(metadata["storage_data"])}
        self.tensors: dict[str, ShardedTensor] = {}
        self.objects: dict[str, Item] = {}
        for name, entry in metadata["state_dict_metadata"].items():
            if entry.kind == _METADATA + "BytesStorageMetadata":
                self.objects[name] = items.pop((name, None))
            else:
                tensor = _fields(entry, "TensorStorageMetadata")
                chunks = tuple(self._chunks(name, tensor["chunks"], items))
                element_type = _element_type(tensor["properties"])
                self.tensors[name] = ShardedTensor(name, element_type, _sizes(tensor["size"]), chunks)
        if items:
            raise ValueError(
                f"{self.directory / '.metadata'} stores {sorted(map(str, items))[0]} that it does not list"
            )

    def _items(self, storage: dict[Any, Any]) -> Iterator[tuple[str, tuple[int, ...] | None, Item]]:
        lengths: dict[str, int] = {}
        for index, info in storage.items():
            place, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
            name, offset, length = where["relative_path"], where["offset"], where["length"]
            path = confined(self.directory, name)
            if name not in lengths:
                if not path.is_file():
                    raise ValueError(f"{path} is missing, .metadata refers to it: partial copy?")
                lengths[name] = path.stat().st_size
            if (
                type(offset) is not int
                or type(length) is not int
                or not 0 <= offset <= offset + length <= lengths[name]
            ):
                raise ValueError(
                    f"{path} has {lengths[name]} bytes, .metadata refers to {offset} + {length}: truncated?"
                )
            if where.get("transform_descriptors"):
                raise ValueError(f"{path} is transformed by {where['transform_descriptors']!r:.100}: not supported")
            yield place["fqn"], place.get("offset"), Item(path, offset, length)

    def _chunks(self, name: str, chunks: list[Any], items: dict[Any, Item]) -> Iterator[Chunk]:
        for record in chunks:
            chunk = _fields(record, "ChunkStorageMetadata")
            offsets, sizes = _sizes(chunk["offsets"]), _sizes(chunk["sizes"])
            item = items.pop((name, offsets), None)
            if item is None:
                raise ValueError(f"{self.directory / '.metadata'} has no data for {name} at {offsets}")
            yield Chunk(offsets, sizes, item)

    def common_state(self) -> dict[str, Any]:
        """Megatron's settings and counters (``args``, ``iteration``, ...), from either place core keeps them."""
        if (self.directory / "common.pt").is_file():
            state = read_torch_file(self.directory / "common.pt")
        elif COMMON_STATE_KEY in self.objects:
            state = self.objects[COMMON_STATE_KEY].open()[0]
        else:
            raise ValueError(f"{self.directory} has neither common.pt nor {COMMON_STATE_KEY}: not written by Megatron")
        if not isinstance(state, dict):
            raise ValueError(f"{self.directory}: the common state is a {type(state).__name__}, not a dictionary")
        return state

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor in memory of its own; ``index``: only that entry of the first axis (a layer)."""
        import torch

        tensor = self.tensors[name]
        start, stop = (0, tensor.shape[0]) if index is None else (index, index + 1)
        chunks = [chunk for chunk in tensor.chunks if chunk.offsets[0] < stop and start < chunk.end(0)]
        shape = (stop - start, *tensor.shape[1:])
        _check_cover(tensor, chunks, start, stop)
        if len(chunks) == 1:
            whole = self._read_chunk(tensor, chunks[0], start - chunks[0].offsets[0], stop - chunks[0].offsets[0])
        else:
            whole = torch.empty(shape, dtype=tensor.element_type.dtype)
            for chunk in chunks:
                first, last = max(start, chunk.offsets[0]), min(stop, chunk.end(0))
                place = [slice(first - start, last - start)]
                place += [slice(chunk.offsets[axis], chunk.end(axis)) for axis in range(1, len(shape))]
                origin = chunk.offsets[0]
                whole[tuple(place)].copy_(self._read_chunk(tensor, chunk, first - origin, last - origin))
        return whole if index is None else whole[0]

    def _read_chunk(self, tensor: ShardedTensor, chunk: Chunk, first: int, last: int) -> torch.Tensor:
        """Entries ``first .. last`` of the first axis of a chunk."""
        stored = chunk.item.open()
        expected = (tensor.element_type, chunk.sizes)
        if not isinstance(stored, StoredTensor) or (stored.element_type, stored.shape) != expected:
            raise ValueError(f"{chunk.item.path} at {chunk.item.offset} does not hold the chunk of {tensor.name}")
        return stored.rows(first, last).read()


def _check_cover(tensor: ShardedTensor, chunks: list[Chunk], start: int, stop: int) -> None:
    """Chunks must cover entries ``start .. stop`` of the first axis exactly once."""
    axes = range(len(tensor.shape))
    count = 0
    for position, chunk in enumerate(chunks):
        if len(chunk.offsets) != len(axes) or any(chunk.end(axis) > tensor.shape[axis] for axis in axes):
            raise ValueError(f"a chunk of {tensor.name} at {chunk.offsets} exceeds its shape {tensor.shape}")
        for other in chunks[:position]:
            if all(chunk.offsets[axis] < other.end(axis) and other.offsets[axis] < chunk.end(axis) for axis in axes):
                raise ValueError(f"chunks of {tensor.name} at {chunk.offsets} and {other.offsets} overlap")
        rows = min(stop, chunk.end(0)) - max(start, chunk.offsets[0])
        count += rows * math.prod(chunk.sizes[1:])
    expected = (stop - start) * math.prod(tensor.shape[1:])
    if count != expected:
        raise ValueError(f"the chunks of {tensor.name} cover {count} of {expected} elements: incomplete checkpoint")


def _fields(record: Any, kind: str) -> dict[str, Any]:
    """The attributes of a data class in a pickle."""
    if not isinstance(record, Record) or record.kind.rpartition(".")[2] != kind or not isinstance(record.state, dict):
        raise TypeError(f"a {kind} is expected")
    return record.state


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or any(type(size) is not int or size < 0 for size in value):
        raise TypeError(f"sizes are expected, not {value!r:.100}")
    return value


def _element_type(properties: Any) -> ElementType:
    name = properties.state[0]
    if not isinstance(name, Name) or name.name not in DTYPES:
        raise TypeError("an unknown element type")
    return DTYPES[name.name]

"""A Megatron ``torch_dist`` iteration, written by torch's own distributed checkpoint writer.

The plan is made from names and shapes; every tensor is built when the writer asks for it and freed when it asks for
the next, so that memory does not grow with depth.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from checkpoints_convert.streams import WRITER_THREADS, HashedFile
from megatron_dmc.checkpoint.torch_dist import COMMON_STATE_KEY
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.tensors import EXTRA_STATE_MODULES, Entry, entries
from megatron_dmc.support.files import write_text
from megatron_dmc.support.progress import Advance

# What Megatron's optimizer sharding was; without an optimizer it only has to be a value that Megatron knows.
_CONTENT_METADATA = {
    "singleton_local_shards": False,
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def write_torch_dist(
    directory: Path,
    shape: MegatronShape,
    arguments: dict[str, Any],
    read: Callable[[Entry], torch.Tensor],
    advance: Advance | None = None,
) -> dict[str, str]:
    """Write one iteration directory that Megatron core 0.19 loads under any layout.

    Args:
        directory: new or empty.
        arguments: Megatron's saved arguments.
        read: gives Megatron's tensor for an entry, in memory of its own; called once for each, by several threads.

    Returns:
        SHA-256 by file name, of the files that were hashed while they were written.
    """
    files = _HashingFileSystem(advance)
    writer = _Writer(directory, thread_count=WRITER_THREADS, sync_files=False)
    writer.fs = files
    planner = _StreamingPlanner(shape, _objects(shape, arguments), read)
    with _without_crc32(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            save({}, storage_writer=writer, planner=planner, no_dist=True)
        finally:
            # The writer's threads end in silence when they fail, and the checkpoint would lack their part.
            if files.failure is not None:
                raise files.failure
    write_text(directory / "metadata.json", '{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return files.sha256


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Nobody reads the CRC32 of torch's zip files, and the manifest has the SHA-256 of everything."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _objects(shape: MegatronShape, arguments: dict[str, Any]) -> dict[str, bytes]:
    """Everything but tensors, under Megatron's keys: the common state, and the empty states of the modules."""
    common = {
        "args": Namespace(**arguments),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": _CONTENT_METADATA,
    }
    objects = {COMMON_STATE_KEY: _saved([common])}
    empty, layers = _saved([None]), shape.config.num_layers
    for module in EXTRA_STATE_MODULES:
        key = module.replace(".*", "") + "._extra_state"
        objects |= {f"{key}/shard_{layer}_{layers}": empty for layer in range(layers)}
    return objects


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


class _StreamingPlanner(DefaultSavePlanner):
    """Plans from shapes, and builds each tensor when it is written."""

    def __init__(self, shape: MegatronShape, objects: dict[str, bytes], read: Callable[[Entry], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._shape = shape
        self._objects = objects
        self._read = read
        self._entries = {_index(entry, shape): entry for entry in entries(shape.config)}
        self._of_thread = threading.local()

    def create_local_plan(self) -> SavePlan:
        items = [
            WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(len(data)))
            for key, data in self._objects.items()
        ]
        items += [self._tensor_item(index, entry) for index, entry in self._entries.items()]
        self.plan = SavePlan(items)
        return self.plan

    def _tensor_item(self, index: MetadataIndex, entry: Entry) -> WriteItem:
        sizes = entry.megatron_shape(self._shape)
        stack = () if entry.layer is None else (self._shape.config.num_layers,)
        assert index.offset is not None
        chunk = ChunkStorageMetadata(index.offset, torch.Size((*(1 for _ in stack), *sizes)))
        properties = TensorProperties(dtype=getattr(torch, self._shape.config.dtype))
        data = TensorWriteData(chunk, properties, torch.Size((*stack, *sizes)))
        return WriteItem(index, WriteItemType.SHARD, tensor_data=data)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(self._objects[write_item.index.fqn])
        self._free_the_last()
        entry = self._entries[write_item.index]
        tensor = self._read(entry)
        assert tuple(tensor.shape) == entry.megatron_shape(self._shape)
        self._of_thread.last = tensor
        return tensor if entry.layer is None else tensor.unsqueeze(0)

    def _free_the_last(self) -> None:
        """Free the tensor that this thread wrote last: torch's writer keeps one of every name."""
        last = getattr(self._of_thread, "last", None)
        if last is not None:
            self._of_thread.last = None
            last.untyped_storage().resize_(0)


def _index(entry: Entry, shape: MegatronShape) -> MetadataIndex:
    offset = [0] * len(entry.megatron_shape(shape))
    return MetadataIndex(entry.stacked_name, torch.Size(offset if entry.layer is None else [entry.layer, *offset]))


class _Writer(FileSystemWriter):
    """Torch's writer without the path of this machine in the checkpoint."""

    def storage_meta(self) -> None:
        return None


class _HashingFileSystem(FileSystem):
    """Writes data files through :class:`HashedFile`.

    Attributes:
        sha256: of every data file, by name.
        failure: what went wrong while one was written.
    """

    def __init__(self, advance: Advance | None) -> None:
        self.sha256: dict[str, str] = {}
        self.failure: BaseException | None = None
        self._advance = advance

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb" or Path(path).suffix != ".distcp":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with HashedFile(Path(path), self._advance) as stream:
                yield stream
        except BaseException as error:
            self.failure = error
            raise
        self.sha256[Path(path).name] = stream.sha256()

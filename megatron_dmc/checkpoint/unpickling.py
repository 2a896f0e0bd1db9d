"""Objects built from a checkpoint: the very bytes that were described are the ones that are unpickled.

:func:`unpickle` first has :func:`~megatron_dmc.checkpoint.pickles.describe` walk the bytes (every name, every argument,
every bound), then unpickles the same bytes from memory with an unpickler that finds no other name. There is nothing in
between that could be exchanged, and no second reader. :func:`load` does the same for files of ``torch.save``: it reads
the archive with our own reader and never with torch's.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatron_dmc.checkpoint.allowed import ALLOWED, STORAGE_DTYPES
from megatron_dmc.checkpoint.nested import check_nested
from megatron_dmc.checkpoint.pickles import describe
from megatron_dmc.checkpoint.tensor_memory import fill
from megatron_dmc.checkpoint.torch_file import Archive, open_archive
from megatron_dmc.support.files import open_regular

_NAMES_BY_OTHER_RELEASES = {
    "__builtin__.": "builtins.",
    "pathlib._local.": "pathlib.",
    "numpy.core.": "numpy._core.",
}

# What the classes of another release say to a state that is none of theirs.
_DOES_NOT_FIT = (
    *(pickle.UnpicklingError, ImportError, AttributeError, TypeError, ValueError),
    *(LookupError, EOFError, ArithmeticError, RuntimeError),
)


def unpickle(data: bytes, what: str) -> Any:
    """The object in a pickle of torch or Megatron, such as ``.metadata``.

    Raises:
        ValueError: it would import, call or hold what no checkpoint needs, or it is damaged.
    """
    check_nested(describe(data, what, ALLOWED), what)
    return _build(data, what, {}, None)


def load(
    source: str | os.PathLike[str] | BinaryIO,
    map_location: Any = None,
    open_file: Callable[[Path], BinaryIO] = open_regular,
) -> Any:
    """What ``torch.load`` returns for a file of ``torch.save``, or for such a stream from where it stands.

    Args:
        map_location: as ``torch.load`` takes it.
        open_file: opens a path.

    Raises:
        ValueError: not exactly such a file, or it holds what no checkpoint needs.
    """
    if isinstance(source, (str, os.PathLike)):
        with open_file(Path(source)) as stream:
            return _load(stream, str(source), map_location)
    return _load(source, str(getattr(source, "name", "a stream")), map_location)


def _load(stream: BinaryIO, what: str, map_location: Any) -> Any:
    start = stream.tell()
    stream.seek(0, io.SEEK_END)
    length = stream.tell() - start  # seek() of torch's views tells a place in the whole file
    archive = open_archive(Path(what), stream, start, length, what)
    check_nested(archive.describe(), what)
    storages = _Storages(archive, stream, map_location)
    functions = {
        "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
        "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    }
    return _build(archive.pickle, what, functions, storages.storage)


class _Storages:
    """The storages of an archive, each read once."""

    def __init__(self, archive: Archive, stream: BinaryIO, map_location: Any) -> None:
        self._archive = archive
        self._stream = stream
        self._restore = torch.serialization._get_restore_location(map_location)
        self._read: dict[str, Any] = {}

    def storage(self, identity: tuple[str, torch.dtype, str, str, int]) -> Any:
        _, dtype, key, location, _ = identity
        if key not in self._read:
            restored = self._restore(self._memory(key).untyped_storage(), location)
            self._read[key] = torch.storage.TypedStorage(wrap_storage=restored, dtype=dtype, _internal=True)
        return self._read[key]

    def _memory(self, key: str) -> torch.Tensor:
        offset, size = self._archive.records[f"data/{key}"]
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        self._stream.seek(self._archive.start + offset)
        fill(memory, self._stream, f"{self._archive.what} is truncated: it ends inside storage {key}")
        return memory


def _build(data: bytes, what: str, functions: Mapping[str, Any], load_persistent: Callable[[Any], Any] | None) -> Any:
    try:
        return _Unpickler(data, functions, load_persistent).load()
    except _DOES_NOT_FIT as error:
        raise ValueError(f"{what} does not fit this release of torch or Megatron: {error!s:.200}") from error


class _Unpickler(pickle.Unpickler):
    """Python's unpickler over bytes that were described, with no names but those that may be mentioned."""

    def __init__(self, data: bytes, functions: Mapping[str, Any], load_persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data), fix_imports=False)
        self._functions = functions
        self._load_persistent = load_persistent

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        return self._functions[full] if full in self._functions else named(full)

    def persistent_load(self, identity: Any) -> Any:
        if self._load_persistent is None:
            raise pickle.UnpicklingError("a persistent id outside a file of torch.save")
        return self._load_persistent(identity)


def named(full: str) -> Any:
    """The object that an allowed name means in this process; storages are meant by their element type.

    Raises:
        pickle.UnpicklingError: the name is not allowed.
        ImportError, AttributeError: it does not exist in the installed releases.
    """
    if full not in ALLOWED:
        raise pickle.UnpicklingError(f"{full} is not among the objects a checkpoint may hold")
    if full in STORAGE_DTYPES:
        return STORAGE_DTYPES[full].dtype
    for theirs, ours in _NAMES_BY_OTHER_RELEASES.items():
        if full.startswith(theirs):
            full = ours + full.removeprefix(theirs)
    module, _, name = full.rpartition(".")
    return getattr(importlib.import_module(module), name)

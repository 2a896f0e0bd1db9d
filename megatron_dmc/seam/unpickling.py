"""Where torch, Megatron and Transformer Engine would build objects from files, ours build them.

Python's pickle runs what a file says. In a process that lets Megatron load a checkpoint, :func:`route` puts functions
that check what they build in the place of ``torch.load``, of the unpickling of ``.metadata``, of ``numpy.load`` (the
index cache of a data set) and of Transformer Engine's states; by name, once, and refused where a release moved one.

What our own processes send each other (workers of data loaders, writers of checkpoints, objects broadcast between
ranks) is pickled and unpickled as before.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import pickle
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dmc.seam.megatron_compat import check_version, symbol

PICKLE_BYTES_LIMIT = 1 << 30
_ORIGINAL = "_megatron_dmc_original"
_TRANSFORMER_ENGINE = ("transformer_engine.pytorch.module.base", "transformer_engine.pytorch.ops.op")


@dataclass(frozen=True)
class Builders:
    """What builds objects in the place of torch, pickle and numpy.

    Attributes:
        load: as ``torch.load(source, map_location)``.
        unpickle: the object in the bytes of a pickle; the second argument says where they come from.
        open_file: opens a file of the checkpoint for reading.
        check_array: raises ``ValueError`` for a file that is not an array of numbers.
        check_choice: raises ``ValueError`` when Megatron, with these parsed arguments, would load from this directory
            something else than what was checked.
    """

    load: Callable[[Any, Any], Any]
    unpickle: Callable[[bytes, str], Any]
    open_file: Callable[[Path], BinaryIO]
    check_array: Callable[[Path], None]
    check_choice: Callable[[str | None, Any], None]


def route(builders: Builders) -> None:
    """Let ``builders`` build everything that comes from files; a second call replaces the first.

    Raises:
        ImportError: the installed torch or Megatron keeps one of the places elsewhere.
    """
    _route_torch_load(builders)
    _route_metadata(builders)
    _route_arrays(builders)
    _route_transformer_engine(builders)
    _route_choice(builders)


def _original(module: Any, name: str) -> Any:
    """What stood in a place before anything was routed."""
    found = getattr(module, name, None)
    if found is None:
        raise ImportError(
            f"{getattr(module, '__name__', module)} has no {name}; unpickling cannot be checked with this release of "
            f"torch or Megatron ({check_version()}): install a tested one"
        )
    return getattr(found, _ORIGINAL, found)


def _put(module: Any, name: str, replacement: Any, original: Any) -> None:
    setattr(replacement, _ORIGINAL, original)
    setattr(module, name, replacement)


def _route_torch_load(builders: Builders) -> None:
    import torch

    original = _original(torch.serialization, "load")

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, pickle_module: Any = None, **_: Any) -> Any:
        if pickle_module is not None:
            raise ValueError(f"torch.load with the pickle module {pickle_module!r}: files are read by one way only")
        return builders.load(f, map_location)

    # A tensor that one of our processes sends another comes through here. Pickle finds the function by its name, which
    # may be Megatron's: the replacement stands in both places.
    own = _original(torch.storage, "_load_from_bytes")

    @functools.wraps(own)
    def load_from_bytes(data: bytes) -> Any:
        return original(io.BytesIO(data), weights_only=True)

    for place in (torch.storage, importlib.import_module(own.__module__)):
        _put(place, "_load_from_bytes" if place is torch.storage else own.__name__, load_from_bytes, own)
    for module in (torch, torch.serialization):
        _put(module, "load", load, original)


def _route_metadata(builders: Builders) -> None:
    """``.metadata``, and the files that the distributed reader opens beside it."""
    module: Any = importlib.import_module("torch.distributed.checkpoint.filesystem")
    reader = _original(module, "FileSystemReader")
    if not {"pickle", "load"} <= set(_original(reader, "read_metadata").__code__.co_names):
        raise ImportError("torch.distributed.checkpoint reads .metadata in a new way: install a tested torch")
    module.pickle = _checked_pickle(builders)
    file_system = _original(module, "FileSystem")
    original = _original(file_system, "create_stream")

    @contextlib.contextmanager
    def create_stream(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with builders.open_file(Path(path)) if mode == "rb" else original(self, path, mode) as stream:
            yield stream

    _put(file_system, "create_stream", create_stream, original)


def _checked_pickle(builders: Builders) -> types.ModuleType:
    """The module ``pickle`` with readers that check."""

    def loads(data: Any, /, **_: Any) -> Any:
        return builders.unpickle(bytes(data), "a pickle")

    def load(file: Any, /, **_: Any) -> Any:
        what = str(getattr(file, "name", "a pickle"))
        data = file.read(PICKLE_BYTES_LIMIT + 1)
        if len(data) > PICKLE_BYTES_LIMIT:
            raise ValueError(f"{what} is larger than the {PICKLE_BYTES_LIMIT} bytes that are allowed for it")
        return builders.unpickle(data, what)

    checked = types.ModuleType("pickle")
    checked.__dict__.update({name: getattr(pickle, name) for name in pickle.__all__ if "npickler" not in name})
    checked.__dict__.update(load=load, loads=loads)
    return checked


def _route_arrays(builders: Builders) -> None:
    import numpy

    original = _original(numpy, "load")

    @functools.wraps(original)
    def load(file: Any, mmap_mode: Any = None, allow_pickle: bool = False, **options: Any) -> Any:
        if isinstance(file, (str, Path)):
            builders.check_array(Path(file))
        return original(file, mmap_mode, False, **options)

    _put(numpy, "load", load, original)


def _route_transformer_engine(builders: Builders) -> None:
    """Its modules unpickle the bytes of ``_extra_state``."""
    if importlib.util.find_spec("transformer_engine") is None:
        return
    for name in _TRANSFORMER_ENGINE:
        module = importlib.import_module(name)
        if not hasattr(module, "pickle"):
            raise ImportError(f"{name} does not unpickle its states with pickle: install a tested Transformer Engine")
        module.pickle = _checked_pickle(builders)  # type: ignore[attr-defined]


def _route_choice(builders: Builders) -> None:
    """Megatron decides here, from its parsed arguments, which iteration of which directory it loads."""
    module, _ = symbol("megatron.training.checkpointing", "_load_base_checkpoint", ("load_dir", "args"))
    original = _original(module, "_load_base_checkpoint")

    @functools.wraps(original)
    def load_base_checkpoint(load_dir: Any, args: Any, *rest: Any, **options: Any) -> Any:
        builders.check_choice(load_dir, args)
        return original(load_dir, args, *rest, **options)

    _put(module, "_load_base_checkpoint", load_base_checkpoint, original)

"""The check that stands before torch or Megatron opens a checkpoint.

It decides which files are loaded, looks at what else lies beside them, and describes every pickle that would be opened,
without opening any: the message comes before a job has started. :class:`CheckedCheckpoint` then hands out these files
and no others, as long as they are the same. Reading headers and pickles, not tensor data, takes seconds for any size.

That is the first of two checks. The second stands where objects are built (``unpickling``), over the very bytes that
are unpickled; it does not rely on this one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_dmc.checkpoint.expected_files import check_files
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, Location, locate
from megatron_dmc.checkpoint.nested import EXTRA_STATE, check_nested
from megatron_dmc.checkpoint.torch_dist import Item, TorchDistCheckpoint
from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file
from megatron_dmc.support.errors import Refused
from megatron_dmc.support.files import open_regular

Identity = tuple[int, int, int, int, int]
"""Device, number, size, and times of change of a file's content and of its entry."""


@dataclass(frozen=True)
class CheckedCheckpoint:
    """A checkpoint whose files were checked, and may be opened as long as they are the same.

    Attributes:
        location: where it is.
        files: every file that a loader opens, by its real path.
        pickles: how many were described.
        unknown: files beside them that no loader opens.
    """

    location: Location
    files: dict[str, Identity]
    pickles: int
    unknown: tuple[str, ...]

    def open(self, path: Path) -> BinaryIO:
        """Open one of the files for reading.

        Raises:
            ValueError: it is none of them, or not the same as when it was checked.
        """
        expected = self.files.get(os.path.realpath(path))
        if expected is None:
            raise Refused(f"{path} is refused: it is not one of the files of {self.location.directory}")
        stream = open_regular(path)
        if identity_of(os.fstat(stream.fileno())) != expected:
            stream.close()
            raise Refused(f"{path} is refused: it changed after it was checked; start again")
        return stream


def check_checkpoint(path: Path | str) -> int:
    """As :func:`examine`; the number of pickles described."""
    return examine(path).pickles


def examine(path: Path | str) -> CheckedCheckpoint:
    """Check the checkpoint that ``path`` means, with every pickle that torch or Megatron would open in it.

    Args:
        path: a ``--save`` directory, one iteration in it, or a Hugging Face directory (no pickles).

    Raises:
        ValueError: damaged, incomplete, a file that does not belong there, or a pickle that imports, calls or holds
            what no checkpoint needs; the message names it.
    """
    return examine_location(locate(path))


def examine_location(location: Location) -> CheckedCheckpoint:
    """As :func:`examine`, of a checkpoint that was located before."""
    unknown = tuple(check_files(location))
    if location.format == HUGGING_FACE:
        return CheckedCheckpoint(location, {}, 0, unknown)
    files = _files_before(location)
    pickles = _check_legacy(location) if location.format == LEGACY else _check_torch_dist(location.directory, files)
    for name, before in files.items():
        if identity_of(os.stat(name)) != before:
            raise ValueError(f"{name} changed while it was checked: start again when nothing writes to it")
    return CheckedCheckpoint(location, files, pickles, unknown)


def identity_of(status: os.stat_result) -> Identity:
    """What tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _files_before(location: Location) -> dict[str, Identity]:
    patterns = ("mp_rank_*/*.pt",) if location.format == LEGACY else (".metadata", "*.json", "*.pt", "*.distcp")
    paths = [os.path.realpath(path) for pattern in patterns for path in location.directory.glob(pattern)]
    return {path: identity_of(os.stat(path)) for path in paths}


def _check_torch_dist(directory: Path, files: dict[str, Identity]) -> int:
    """The number of pickles; ``files`` keeps those that the checkpoint refers to."""
    checkpoint = TorchDistCheckpoint(directory)
    scanned = 1
    common = directory / "common.pt"
    if common.is_file():
        check_nested(read_torch_file(common), str(common))
        scanned += 1
    items = list(checkpoint.objects.items())
    items += [(name, chunk.item) for name, tensor in checkpoint.tensors.items() for chunk in tensor.chunks]
    by_file: dict[Path, list[tuple[str, Item]]] = {}
    for name, item in items:
        by_file.setdefault(item.path, []).append((name, item))
    referred = {os.path.realpath(path) for path in by_file}
    for name in [name for name in files if name.endswith(".distcp") and name not in referred]:
        del files[name]
    for path, entries in by_file.items():
        with open_regular(path) as stream:
            for name, item in sorted(entries, key=lambda entry: entry[1].offset):
                _check_item(name, item, stream, is_tensor=name in checkpoint.tensors)
                scanned += 1
    return scanned


def _check_item(name: str, item: Item, stream: BinaryIO, is_tensor: bool) -> None:
    content = item.describe(stream)
    if not is_tensor:
        check_nested(content, f"{name} in {item.path}", is_extra_state=EXTRA_STATE in name)
    elif not isinstance(content, StoredTensor):
        raise ValueError(f"{item.path} at {item.offset} holds a {type(content).__name__}, not {name}")


def _check_legacy(location: Location) -> int:
    ranks = LegacyCheckpoint(location.directory).paths.values()
    paths = sorted(path for rank in ranks for path in rank.parent.glob("*.pt"))
    for path in paths:
        check_nested(read_torch_file(path), str(path))
    return len(paths)

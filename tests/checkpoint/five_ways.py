"""Five ways by which a command inside a foreign checkpoint once ran through the product's own commands.

Each takes a ``--save`` directory with an honest checkpoint and its tracker, plants a command that creates ``marker``,
and returns the flags that a victim would give. All had one cause: the guard read something, Megatron and torch read
something else.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import torch

TRACKER = "latest_checkpointed_iteration.txt"
COMMON_STATE = "common_state/shard_0_1"


class Touch:
    """Unpickled as Python does it, it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def as_iteration(root: Path, number: int = 1) -> Path:
    """Make the release in ``root`` an iteration."""
    directory = root / f"iter_{number:07d}"
    if (root / "release").is_dir():
        (root / "release").rename(directory)
    (root / TRACKER).write_text(str(number))
    return directory


def poison_metadata(path: Path, marker: Path) -> None:
    """Put the command into a copy of ``.metadata`` that is whole otherwise."""
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = [Touch(marker)]
    path.write_bytes(pickle.dumps(metadata))


def replace_object(directory: Path, key: str, stored: bytes) -> None:
    """Let ``key`` be ``stored``, the bytes of an archive, in a file of its own."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == key)
    info.relative_path, info.offset, info.length = "__7_0.distcp", 0, len(stored)
    (directory / "__7_0.distcp").write_bytes(stored)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def another_folder(root: Path, marker: Path) -> list[str]:
    """An honest checkpoint in the root; the tracker names a folder with another one."""
    directory = as_iteration(root)
    for path in directory.iterdir():
        if path.is_file():
            shutil.copyfile(path, root / path.name)
    poison_metadata(directory / ".metadata", marker)
    return []


def another_iteration(root: Path, marker: Path) -> list[str]:
    """The tracker names an honest iteration; a flag chooses another one."""
    shutil.copytree(as_iteration(root), root / "iter_0000002")
    poison_metadata(root / "iter_0000002" / ".metadata", marker)
    return ["--ckpt-step", "2"]


def another_file(root: Path, marker: Path) -> list[str]:
    """``.metadata`` is harmless but cannot be built; torch falls back to the metadata of rank 0."""
    directory = as_iteration(root)
    path = directory / ".metadata"
    shutil.copyfile(path, directory / "__0.metadata")
    poison_metadata(directory / "__0.metadata", marker)
    whole = path.read_bytes()
    assert whole.endswith(b".")
    member = b"ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x63\x85R0"
    path.write_bytes(whole[:-1] + member + b".")
    return []


def another_directory(root: Path, marker: Path) -> list[str]:
    """An archive whose locator names another end record than the one in front of it."""
    directory = as_iteration(root)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    info = next(info for index, info in metadata.storage_data.items() if index.fqn == COMMON_STATE)
    honest = (directory / info.relative_path).read_bytes()[info.offset :][: info.length]
    common = torch.load(io.BytesIO(honest), weights_only=False)
    stream = io.BytesIO()
    torch.save([common[0] | {"more": Touch(marker)}], stream)
    replace_object(directory, COMMON_STATE, two_archives(honest, stream.getvalue()))
    return []


def two_archives(first: bytes, second: bytes) -> bytes:
    """One file that Python's zipfile reads as ``first`` and torch as ``second``."""
    end = 98
    size, place = struct.unpack("<QQ", first[-end + 40 : -end + 56])
    other_size, other_place = struct.unpack("<QQ", second[-end + 40 : -end + 56])
    directory = bytearray(second[other_place : other_place + other_size])
    position = 0
    while position < len(directory):  # every place moves behind the records of the first
        at = struct.unpack_from("<L", directory, position + 42)[0]
        struct.pack_into("<L", directory, position + 42, at + place)
        position += 46 + sum(struct.unpack_from("<3H", directory, position + 28))
    count = struct.unpack_from("<Q", second, len(second) - end + 24)[0]
    body = first[:place] + second[:other_place]
    hidden = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0x31E, 45, 0, 0, count, count, len(directory), len(body))
    shown_place = len(body) + len(directory) + len(hidden)
    shown = bytearray(first[-end:])
    struct.pack_into("<Q", shown, 48, shown_place)
    struct.pack_into("<Q", shown, 56 + 8, len(body) + len(directory))
    struct.pack_into("<L", shown, 76 + 16, shown_place)
    return body + bytes(directory) + hidden + first[place : place + size] + bytes(shown)


def swapped(root: Path, marker: Path) -> list[str]:
    """Honest while it is looked at; :func:`swap` then puts another file in its place."""
    path = as_iteration(root) / ".metadata"
    shutil.copyfile(path, root / "other")
    poison_metadata(root / "other", marker)
    return []


def swap(root: Path) -> None:
    """Between the look and the load."""
    (root / "other").replace(root / "iter_0000001" / ".metadata")


WAYS = {way.__name__: way for way in (another_folder, another_iteration, another_file, another_directory, swapped)}

"""Files that are either absent, old or complete: written beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HASH_BLOCK_BYTES = 1 << 22


def sync_file(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flush every file below ``directory``, then the directories, deepest first."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_file(Path(folder))


def write_text(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(beside, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)
    sync_file(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON in one step."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def new_directory(destination: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``destination`` that takes its place when the block ends well.

    After a kill at any moment ``destination`` is as it was, or whole and new. A failed block removes what it wrote.

    Raises:
        ValueError: ``destination`` exists and ``overwrite`` is false.
    """
    destination = Path(destination)
    if destination.exists() and not overwrite:
        raise ValueError(f"{destination} exists: choose another destination, or give --overwrite to replace it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        sync_tree(beside)
        _replace_directory(beside, destination)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _replace_directory(new: Path, destination: Path) -> None:
    # A directory cannot be renamed over a full one: the old one steps aside first, and a kill between the two
    # renames leaves it complete under its temporary name.
    old = destination.with_name(f".{destination.name}.{os.getpid()}.old")
    if destination.exists():
        os.replace(destination, old)
    os.replace(new, destination)
    sync_file(destination.parent)
    shutil.rmtree(old, ignore_errors=True)

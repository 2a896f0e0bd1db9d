"""File names that stay inside their directory, and reads of an exact length."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from megatron_dmc.support.errors import Refused


def confined(directory: Path, name: object) -> Path:
    """``directory / name`` for a plain file name that a checkpoint's index states.

    A link may only lead to a file of the same directory, or into the ``blobs`` of a model in a Hugging Face cache.

    Raises:
        ValueError: ``name`` is not a plain file name, or leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{directory} names a file {name!r}: only plain file names of the same directory are allowed")
    path = directory / name
    resolved = path.resolve()
    in_hub_cache = resolved.parent.name == "blobs" and resolved.parent.parent.name.startswith("models--")
    if not in_hub_cache and not resolved.is_relative_to(directory.resolve()):
        raise Refused(f"{path} is a link to {resolved}, outside its directory: copy the file to its place")
    return path


def read_exactly(stream: BinaryIO, offset: int, length: int, what: str) -> bytes:
    """``length`` bytes at ``offset``; ``ValueError`` where the file ends before."""
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise ValueError(f"{what} is truncated: {length} bytes expected at {offset}, {len(data)} found")
    return data

"""Reading with bounds, and file names that stay inside their directory."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from megatron_dmc.support.files import JSON_BYTES_LIMIT, parse_json, read_bounded, read_json

__all__ = ["JSON_BYTES_LIMIT", "confined", "parse_json", "read_bounded", "read_exactly", "read_json"]


def confined(directory: Path, name: object) -> Path:
    """``directory / name`` for a plain file name that a checkpoint's index states.

    A link may only lead to a file of the same directory, or into the ``blobs`` of the Hugging Face cache that the
    directory belongs to.

    Raises:
        ValueError: ``name`` is not a plain file name, or leads elsewhere.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{directory} names a file {name!r}: only plain file names of the same directory are allowed")
    path = directory / name
    resolved, home = path.resolve(), directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(resolved.is_relative_to(allowed) for allowed in homes):
        raise ValueError(f"{path} is a link to {resolved}, outside its directory: copy the file to its place")
    return path


def read_exactly(stream: BinaryIO, offset: int, length: int, what: str) -> bytes:
    """``length`` bytes at ``offset``; ``ValueError`` where the file ends before."""
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise ValueError(f"{what} is truncated: {length} bytes expected at {offset}, {len(data)} found")
    return data

"""Reading with bounds, and file names that stay inside their directory."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

JSON_BYTES_LIMIT = 1 << 26
"""Far above the index of any model (a 70B Llama: 60 KB)."""


class Refused(ValueError):
    """A file holds something that no checkpoint needs: it was made so, rather than damaged."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; anything else (a pipe, a device, a socket, a folder) is not opened.

    Raises:
        ValueError: there is no regular file at ``path``, or it may not be read.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise Refused(f"{path} is not a regular file: it is {kind_of(mode)}")
        stream = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 -- the caller closes it
    except OSError as error:
        raise ValueError(f"{path} is missing or not a regular file ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise Refused(f"{path} is not a regular file any more")
    return stream


def _open_without_waiting(path: str, flags: int) -> int:
    """A pipe that took the place of the file must not stop this process."""
    return os.open(path, flags | os.O_NONBLOCK)


def kind_of(mode: int) -> str:
    """What a file is, in words."""
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    return next((told for is_kind, told in kinds if is_kind(mode)), "a device")


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes.

    Raises:
        ValueError: the file is missing, not a regular file, or larger.
    """
    with open_regular(path) as stream:
        if os.fstat(stream.fileno()).st_size > limit:
            raise Refused(f"{path} is larger than the {limit} bytes that are allowed for it")
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"{path} is larger than the {limit} bytes that are allowed for it")
    return data


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object without repeated names, infinities or NaN.

    Raises:
        ValueError: anything else; the message names ``what``.
    """
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}: a JSON object is expected")
    return value


def read_json(path: Path, limit: int = JSON_BYTES_LIMIT) -> dict[str, Any]:
    """The JSON object in a file; see :func:`parse_json`."""
    return parse_json(read_bounded(path, limit), str(path))


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
        raise Refused(f"{path} is a link to {resolved}, outside its directory: copy the file to its place")
    return path


def read_exactly(stream: BinaryIO, offset: int, length: int, what: str) -> bytes:
    """``length`` bytes at ``offset``; ``ValueError`` where the file ends before."""
    stream.seek(offset)
    data = stream.read(length)
    if len(data) != length:
        raise ValueError(f"{what} is truncated: {length} bytes expected at {offset}, {len(data)} found")
    return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in one object")
    return mapping


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")

"""Files that are either absent, old or complete: written beside their place, synced, renamed. Reading has bounds."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dmc.support.errors import Refused

HASH_BLOCK_BYTES = 1 << 22
JSON_BYTES_LIMIT = 1 << 26
"""Far above the index of any model (a 70B Llama: 60 KB)."""

# <fcntl.h> and <linux/fs.h>
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


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


def to_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """``value`` as JSON that every parser reads: a number that is not finite, which JSON has not, becomes ``null``."""
    return json.dumps(_finite(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: Any) -> None:
    """Replace ``path`` by ``value`` as indented JSON in one step; see :func:`to_json`."""
    write_text(path, to_json(value, indent=2, sort_keys=True) + "\n")


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


def parse_json(data: bytes, what: str, *, finite: bool = True) -> dict[str, Any]:
    """A JSON object without repeated names, and without infinities and NaN unless ``finite`` is false.

    Raises:
        ValueError: anything else; the message names ``what``.
    """
    constant = _refuse_constant if finite else None
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_without_repeats, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__}: a JSON object is expected")
    return value


def read_json(path: Path, limit: int = JSON_BYTES_LIMIT, *, finite: bool = True) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes, which may begin with a byte order mark."""
    return parse_json(read_bounded(path, limit).removeprefix(codecs.BOM_UTF8), str(path), finite=finite)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice in one object")
    return mapping


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def free_space(path: Path) -> tuple[Path, int]:
    """The nearest folder at or above ``path`` that exists, and the free bytes of its disk."""
    existing = next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.exists())
    return existing, shutil.disk_usage(existing).free


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

    After a kill at any moment ``destination`` is as it was, or whole and new: the two directories are exchanged in
    one step (``renameat2``). On a file system without that step (some network ones) the old directory is renamed
    aside first; a kill between the two renames leaves it whole beside the destination, and the next call for the
    same destination puts it back. A failed block removes what it wrote; what a killed process of this machine left
    behind is removed by the next call.

    Raises:
        ValueError: ``destination`` exists and ``overwrite`` is false.
    """
    destination = Path(os.path.realpath(destination))
    _clean_up_after_killed(destination)
    if destination.exists() and not overwrite:
        raise ValueError(f"{destination} exists: choose another destination, or give --overwrite to replace it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(destination, "partial")
    _remove(beside)
    beside.mkdir()
    try:
        yield beside
        sync_tree(beside)
        _replace_directory(beside, destination)
    except BaseException:
        _remove(beside)
        raise


def _replace_directory(new: Path, destination: Path) -> None:
    if not destination.exists():
        os.rename(new, destination)
        sync_file(destination.parent)
    elif _exchange(new, destination):
        sync_file(destination.parent)
        _remove(new)
    else:
        old = _beside(destination, "old")
        os.rename(destination, old)
        os.rename(new, destination)
        sync_file(destination.parent)
        _remove(old)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths of one file system in one step; False where kernel, library or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(error, os.strerror(error), str(second))


def _beside(destination: Path, suffix: str) -> Path:
    return destination.with_name(f".{destination.name}.{socket.gethostname()}.{os.getpid()}.{suffix}")


def _clean_up_after_killed(destination: Path) -> None:
    """Remove or put back what processes of this machine that no longer run left beside ``destination``."""
    pattern = re.compile(
        re.escape(f".{destination.name}.{socket.gethostname()}.") + r"(?P<pid>[0-9]+)\.(?P<suffix>partial|old)"
    )
    for path in sorted(destination.parent.glob(f".{glob.escape(destination.name)}.*")):
        match = pattern.fullmatch(path.name)
        if match is None or _runs(int(match["pid"])):
            continue
        if match["suffix"] == "old" and not destination.exists():
            os.rename(path, destination)
        else:
            _remove(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

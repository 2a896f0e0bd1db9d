"""Which files the folder of a checkpoint may hold, told from names and kinds alone: nothing is opened here."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from megatron_dmc.checkpoint.bounded import confined
from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, TORCH_DIST, Location
from megatron_dmc.support.errors import Refused
from megatron_dmc.support.files import kind_of

ENTRIES_LIMIT = 200_000
"""Far above the files of a checkpoint of ten thousand ranks."""

_OURS = r"manifest\.json|hugging_face/[^/]+"
_RANK = r"mp_rank_[0-9]{2}(_[0-9]{3}){0,2}/(model_optim_rng|distrib_optim|layer_wise_optimizer_[0-9]+)\.pt"
_KNOWN = {
    LEGACY: rf"{_RANK}|{_OURS}",
    TORCH_DIST: rf"\.metadata|metadata\.json|common\.pt|integrity\.json|__[0-9]+_[0-9]+\.distcp|{_OURS}",
}
_INERT = re.compile(
    r".*\.(txt|md|json|jsonl|yaml|yml|toml|log|csv|png|svg|html|jinja|model|safetensors|sha256)"
    r"|(.*/)?(LICENSE[^/]*|NOTICE|README[^/]*|USE_POLICY[^/]*|\.DS_Store|\.gitattributes|\.nfs[0-9a-f]+|events\.out\.[^/]*)"
)
"""No loader of torch or Megatron opens these."""
_WEIGHTS = re.compile(r".*\.(safetensors|bin|index\.json)")
"""Of a Hugging Face directory."""


def check_files(location: Location) -> list[str]:
    """Look at every file of a checkpoint's folder; the names of those that are not known.

    Raises:
        Refused: a link that leads out of the checkpoint, a pipe or a device, or an unknown file that a loader of
            torch or Megatron could open.
    """
    if not location.directory.resolve().is_relative_to(location.root.resolve()):
        raise Refused(f"{location.directory} is a link that leads out of {location.root}: copy it to its place")
    if location.format == HUGGING_FACE:
        return _check_model_directory(location.directory)
    known = re.compile(_KNOWN[location.format])
    # Beside the ranks of a published release lie the files of its repository; no loader looks there.
    is_repository = location.format == LEGACY and location.directory == location.root
    unknown = []
    for path in _walk(location.directory):
        name = path.relative_to(location.directory).as_posix()
        if known.fullmatch(name):
            continue
        if not _INERT.fullmatch(name) and not is_repository:
            raise Refused(
                f"{path} belongs to no {location.format} checkpoint, and a loader could open it: move it elsewhere"
            )
        unknown.append(name)
    return unknown


def _check_model_directory(directory: Path) -> list[str]:
    """Weights are read as data wherever a link leads; other files are copied along, so they must belong here."""
    for entry in directory.iterdir():
        _check_kind(entry if _WEIGHTS.fullmatch(entry.name) else confined(directory, entry.name))
    return []


def _check_kind(path: Path) -> int:
    """The mode of a file or folder; a link counts as what it leads to."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise Refused(f"{path} cannot be looked at ({error.strerror}): remove it") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise Refused(f"{path} is {kind_of(mode)}: a checkpoint holds regular files")
    return mode


def _walk(directory: Path) -> Iterator[Path]:
    """Every regular file below ``directory``; links may lead to other files there."""
    home = directory.resolve()
    pending, count = [directory], 0
    while pending:
        for entry in os.scandir(pending.pop()):
            path = Path(entry.path)
            count += 1
            if count > ENTRIES_LIMIT:
                raise Refused(f"{directory} holds more than {ENTRIES_LIMIT} files: not a checkpoint")
            if entry.is_symlink() and not path.resolve().is_relative_to(home):
                raise Refused(f"{path} is a link that leads out of {home}: copy the file to its place")
            mode = _check_kind(path)
            if stat.S_ISDIR(mode):
                if entry.is_symlink():
                    raise Refused(f"{path} is a link to a folder: a checkpoint holds its own")
                pending.append(path)
            else:
                yield path

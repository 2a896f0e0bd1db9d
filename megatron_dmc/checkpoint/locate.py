"""Which checkpoint a path means: a Hugging Face directory, or an iteration of a Megatron one."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.checkpoint.bounded import read_bounded

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_([0-9]{7,})")
_RANK = re.compile(r"mp_rank_[0-9]{2}(_[0-9]{3})?")
RELEASE = "release"

HUGGING_FACE = "hugging_face"
TORCH_DIST = "torch_dist"
LEGACY = "torch"


@dataclass(frozen=True)
class Location:
    """Where a checkpoint is.

    ``root`` is the directory that was asked for (for Megatron: with the tracker file), ``directory`` the one with the
    weights, ``format`` one of ``hugging_face``, ``torch_dist``, ``torch``; ``iteration`` 0 for a release.
    """

    format: str
    root: Path
    directory: Path
    iteration: int = 0


def locate(path: Path | str) -> Location:
    """The checkpoint at ``path``: a Hugging Face directory, a Megatron ``--save`` directory, or one iteration in it.

    Raises:
        ValueError: there is none; the message says what is missing.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a directory: give a Hugging Face model or a Megatron checkpoint")
    if _megatron_format(path) is not None:
        return _iteration_at(path, path.parent if _iteration_of(path.name) is not None else path)
    if has_tracker(path):
        return _iteration_at(path / _tracked(path), path)
    if (path / "config.json").is_file():
        return Location(HUGGING_FACE, path, path)
    raise ValueError(
        f"{path} holds no checkpoint: neither config.json (Hugging Face), nor {TRACKER} (Megatron), nor the files of "
        "an iteration (metadata.json with .metadata, or mp_rank_*)"
    )


def has_tracker(root: Path) -> bool:
    """Whether something in ``root`` claims to name its newest checkpoint."""
    return os.path.lexists(root / TRACKER)


def read_tracker(root: Path) -> str:
    """What the tracker file in ``root`` names: ``release``, or digits.

    Raises:
        ValueError: it names nothing, or is not a regular file.
    """
    text = read_bounded(root / TRACKER, 64).decode("ascii", "replace").strip()
    if text != RELEASE and not re.fullmatch(r"[0-9]{1,12}", text):
        raise ValueError(f"{root / TRACKER} holds {text!r}: a number of iterations or {RELEASE!r} is expected")
    return text


def _iteration_at(directory: Path, root: Path) -> Location:
    found = _megatron_format(directory)
    if found is None:
        raise ValueError(
            f"{directory} is missing or holds no checkpoint, although {root / TRACKER} names it: partial copy?"
        )
    number = _iteration_of(directory.name)
    if number is None:  # the layout of NVIDIA's releases: ranks beside the tracker
        text = read_tracker(root) if has_tracker(root) else RELEASE
        number = 0 if text == RELEASE else int(text)
    return Location(found, root, directory, number)


def _iteration_of(name: str) -> int | None:
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else 0 if name == RELEASE else None


def _tracked(root: Path) -> str:
    text = read_tracker(root)
    return RELEASE if text == RELEASE else f"iter_{int(text):07d}"


def _megatron_format(directory: Path) -> str | None:
    if (directory / "metadata.json").is_file() and (directory / ".metadata").is_file():
        return TORCH_DIST
    if directory.is_dir() and any(_RANK.fullmatch(entry.name) for entry in directory.iterdir()):
        return LEGACY
    return None

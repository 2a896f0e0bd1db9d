"""Which checkpoint a path means: a Hugging Face directory, or an iteration of a Megatron one.

Where there is a tracker file, it decides, as it does for Megatron: what is looked at here is what Megatron loads.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.support.errors import Refused
from megatron_dmc.support.files import read_bounded

TRACKER = "latest_checkpointed_iteration.txt"
_ITERATION = re.compile(r"iter_([0-9]{7,})")
_RANK = re.compile(r"mp_rank_[0-9]{2}(_[0-9]{3})?")
_PART = re.compile(r"mp_rank_.*|\.metadata|metadata\.json|.*\.(distcp|pt)")
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
    if has_tracker(path):
        return _tracked(path)
    found = _megatron_format(path)
    if found is not None:
        number = _iteration_of(path.name)
        return Location(found, path if number is None else path.parent, path, number or 0)
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


def _tracked(root: Path) -> Location:
    """The checkpoint that the tracker names."""
    text = read_tracker(root)
    number = 0 if text == RELEASE else int(text)
    directory = root / (RELEASE if text == RELEASE else f"iter_{number:07d}")
    loose = _loose_files(root)
    if loose and (directory.is_dir() or _megatron_format(root) != LEGACY):
        raise Refused(
            f"{root} holds {loose[0]} beside {TRACKER}, which names {directory.name}: which of the two is the "
            "checkpoint cannot be told; move one of them elsewhere"
        )
    if loose:  # the layout of NVIDIA's releases: ranks beside the tracker
        return Location(LEGACY, root, root, number)
    found = _megatron_format(directory)
    if found is None:
        raise ValueError(f"{directory} is missing or holds no checkpoint, although {root / TRACKER} names it")
    return Location(found, root, directory, number)


def _loose_files(root: Path) -> list[str]:
    """Parts of a checkpoint that lie in ``root`` itself."""
    return sorted(entry.name for entry in root.iterdir() if _PART.fullmatch(entry.name))


def _iteration_of(name: str) -> int | None:
    match = _ITERATION.fullmatch(name)
    return int(match[1]) if match else 0 if name == RELEASE else None


def _megatron_format(directory: Path) -> str | None:
    """As Megatron tells it: ``metadata.json`` decides, then the folders of ranks."""
    if not directory.is_dir():
        return None
    if (directory / "metadata.json").is_file():
        return TORCH_DIST if (directory / ".metadata").is_file() else None
    return LEGACY if any(_RANK.fullmatch(entry.name) for entry in directory.iterdir()) else None

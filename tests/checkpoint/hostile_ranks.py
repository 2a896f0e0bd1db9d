"""Hostile checkpoints of the legacy layout by kind, each made from an honest one of one rank."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.checkpoint.archives import saved
from tests.checkpoint.five_ways import Touch, two_archives
from tests.checkpoint.hostile import Plant, evil_archive, file_of


def _rank(change: Callable[[Path, Path], None]) -> Plant:
    return lambda directory, marker: change(directory / "mp_rank_00" / "model_optim_rng.pt", marker)


def _rewrite(path: Path, marker: Path) -> None:
    state = torch.load(path, weights_only=False)
    torch.save({**state, "rng_state": [Touch(marker)]}, path)


def _legacy_two(path: Path, marker: Path) -> None:
    path.write_bytes(two_archives(path.read_bytes(), saved({"model": Touch(marker)})))


def _legacy_link(path: Path, marker: Path) -> None:
    shutil.copyfile(path, marker.parent / "outside")
    path.unlink()
    path.symlink_to(marker.parent / "outside")


def _legacy_pipe(path: Path, marker: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _legacy_old(path: Path, marker: Path) -> None:
    torch.save(Touch(marker), path, _use_new_zipfile_serialization=False)


def legacy_kinds() -> dict[str, Plant]:
    """Every kind for the legacy layout, a whole folder of one rank."""
    return {
        "in the state": _rank(_rewrite),
        "two directories": _rank(_legacy_two),
        "old format of torch": _rank(_legacy_old),
        "a plain pickle": _rank(lambda path, marker: path.write_bytes(pickle.dumps(Touch(marker)))),
        "link": _rank(_legacy_link),
        "pipe": _rank(_legacy_pipe),
        "in the optimizer": file_of("mp_rank_00/distrib_optim.pt", evil_archive),
        "a device": _rank(lambda path, marker: (path.unlink(), path.symlink_to("/dev/zero"))),
    }

"""Which checkpoint a distilled run learns from: found and checked before Megatron opens anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.config import DECISIONS, NONE, DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.training.start import Start

if TYPE_CHECKING:
    from megatron_dmc.checkpoint.guard import CheckedCheckpoint

FLAG = "--dmc-teacher"


def with_teacher(start: Start, settings: DMCConfig, given: str | None) -> Start:
    """``start`` with the teacher of the run.

    Args:
        start: where the run starts; it may know the model before its retrofit.
        settings: of the run.
        given: the value of the flag, or None.

    Raises:
        ValueError: as :func:`find_teacher`, or a flag that has no meaning here.
    """
    if given is not None:
        _check_flag(settings, given)
    return dataclasses.replace(start, teacher=find_teacher(settings, given or start.origin, start.config))


def _check_flag(settings: DMCConfig, given: str) -> None:
    if settings.distill == NONE:
        raise ValueError(f"{FLAG} {given}: nothing learns from it; add --dmc-distill forward, or leave it out")
    if settings.train == DECISIONS:
        raise ValueError(
            f"{FLAG} {given}: with --dmc-train decisions the model itself teaches, with eviction off; leave it out"
        )


def _needs_frozen(settings: DMCConfig) -> bool:
    """Whether a copy of the model before its retrofit must be kept; adapters alone change nothing else."""
    return settings.retrofits and settings.distill != NONE and settings.train != DECISIONS


def find_teacher(settings: DMCConfig, directory: str | None, student: ModelConfig | None) -> CheckedCheckpoint | None:
    """The checkpoint to load a frozen teacher from, after it was checked; None where no copy is needed.

    Args:
        settings: of the run.
        directory: a plain checkpoint; None: nobody knows one.
        student: shape of the model that learns.

    Raises:
        ValueError: there is none, it is damaged or hostile, was compressed itself, or is another model.
    """
    if not _needs_frozen(settings):
        return None
    wanted = f"give {FLAG} DIR, the plain checkpoint (stage off) that the retrofit began with"
    if directory is None:
        raise ValueError(f"--dmc-distill {settings.distill} needs a teacher: {wanted}")
    if not Path(directory).is_dir():
        raise ValueError(f"{FLAG} {directory}: no such directory; {wanted}")
    from megatron_dmc.checkpoint.guard import examine
    from megatron_dmc.checkpoint.locate import TORCH_DIST
    from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments

    checkpoint = examine(directory)
    if checkpoint.location.format != TORCH_DIST:
        raise ValueError(f"{FLAG} {directory}: no torch_dist checkpoint; make one with megatron-dmc convert import")
    saved = read_saved_arguments(Path(directory))
    if saved.dmc is not None and saved.dmc.retrofits:
        raise ValueError(f"{FLAG} {directory}: of stage {saved.dmc.stage}; a teacher is a plain checkpoint (stage off)")
    if student is not None:
        _check_shape(directory, saved.config, student)
    return checkpoint


def _check_shape(directory: str, teacher: ModelConfig, student: ModelConfig) -> None:
    """They must be one model, apart from how its numbers are stored, and from what a retrofit adds."""
    different = [
        f"{field.name}={getattr(teacher, field.name)!r}, the student {getattr(student, field.name)!r}"
        for field in dataclasses.fields(ModelConfig)
        if field.name not in ("dtype", "adapter") and getattr(teacher, field.name) != getattr(student, field.name)
    ]
    if different:
        raise ValueError(f"{FLAG} {directory}: another model than the student; it has {'; it has '.join(different)}")

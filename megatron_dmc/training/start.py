"""What a run starts from, read and checked before Megatron opens anything.

Megatron's own answers to a wrong path are training from random weights, or leaving with exit status 0.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.config import DMCConfig, has_adapter
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.runs.completeness import outcome_of
from megatron_dmc.stages import OFF, find_stage

if TYPE_CHECKING:
    from megatron_dmc.checkpoint.guard import CheckedCheckpoint

TRACKER = "latest_checkpointed_iteration.txt"
# What may differ between the start of a stage and its continuation.
_MAY_CHANGE = frozenset({"stop_at_cr"})


@dataclass(frozen=True)
class Start:
    """Where a run starts.

    Attributes:
        config: shape of the model; None when it is trained from scratch by Megatron's own flags.
        resumes: continues its own stage from ``--save``.
        clears_rows: the borrowed rows must become zero before the first step.
        creates_adapters: the checkpoint has no adapters; they begin at zero.
        first_sample: where the stage starts in the training data; consumed samples of the checkpoint before it.
        checkpoint: what Megatron may load, after it was checked; None: nothing.
        origin: directory of the plain checkpoint that the retrofit began with, the teacher if nobody names another;
            None where that is not known.
        teacher: what a frozen teacher is loaded from, after it was checked; None: there is none.
        saved_arguments: of the run that is continued; empty for one that begins.
    """

    config: ModelConfig | None
    resumes: bool
    clears_rows: bool = False
    first_sample: int = 0
    creates_adapters: bool = False
    checkpoint: CheckedCheckpoint | None = None
    origin: str | None = None
    teacher: CheckedCheckpoint | None = None
    saved_arguments: Mapping[str, Any] = field(default_factory=dict)


def saved_iteration(directory: str | Path | None) -> int | None:
    """Iteration of the newest complete checkpoint below ``directory``; None where there is none."""
    if not directory:
        return None
    from megatron_dmc.checkpoint.locate import RELEASE, has_tracker, read_tracker

    if not has_tracker(Path(directory)):
        return None
    text = read_tracker(Path(directory))
    return 0 if text == RELEASE else int(text)


def find_start(settings: DMCConfig, save: str | None, base: str | None) -> Start:
    """Decide where the run starts and check it.

    Args:
        settings: of this run.
        save: directory of its own checkpoints; it continues there when one exists.
        base: checkpoint to start from otherwise.

    Raises:
        ValueError: no base weights, a damaged or hostile checkpoint, a stage that cannot follow, or a continuation
            with other settings.
    """
    if saved_iteration(save) is not None:
        return _resume(settings, str(save))
    if base is None:
        if settings.retrofits:
            raise ValueError(
                f"--dmc-stage {settings.stage} needs trained weights: give --pretrained-checkpoint DIR, a checkpoint "
                "made by `megatron-dmc convert import` or by the previous stage"
            )
        return Start(config=None, resumes=False)
    saved = saved_iteration(base)
    if saved is None:
        raise ValueError(
            f"--pretrained-checkpoint {base}: no {TRACKER} there; give a directory written by "
            "`megatron-dmc convert import` or by a training stage"
        )
    checkpoint, stored = _read(base)
    base_stage = find_stage(stored.dmc.stage) if stored.dmc else OFF
    stage = find_stage(settings.stage)
    stage.check_base(base_stage, base, settings.borrows_channel)
    if stored.dmc is not None:
        _check_method(settings, stored.dmc, base)
        _check_finished(base, base_stage.name, saved, stored.args.get("train_iters"))
    consumed = int(stored.args.get("consumed_train_samples") or 0) if base_stage is not OFF else 0
    return Start(
        stored.config,
        resumes=False,
        clears_rows=stage.clears_rows(base_stage),
        first_sample=consumed,
        creates_adapters=has_adapter(settings) and not has_adapter(stored.dmc),
        checkpoint=checkpoint,
        origin=os.path.realpath(base) if base_stage is OFF else _origin(stored.args),
    )


def _origin(args: Mapping[str, Any]) -> str | None:
    """What a checkpoint says about the one that its retrofit began with."""
    directory = args.get("dmc_teacher")
    return directory if isinstance(directory, str) else None


def _check_method(settings: DMCConfig, before: DMCConfig, base: str) -> None:
    """A retrofit goes on with the method, and the source of decisions, that it began with."""
    for name in ("method", "decision_source"):
        mine, theirs = getattr(settings, name), getattr(before, name)
        if before.retrofits and mine != theirs:
            flag = "--dmc-" + name.replace("_", "-")
            raise ValueError(f"--pretrained-checkpoint {base} was made with {flag} {theirs}, not {mine}: give {theirs}")


def _check_finished(base: str, stage: str, iteration: int, train_iters: int | None) -> None:
    """Refuse a stage that was interrupted. Iteration 0 is a release: converted, not trained."""
    outcome = outcome_of(base, iteration, train_iters)
    if iteration and not outcome.finished:
        raise ValueError(
            f"--pretrained-checkpoint {base}: stage {stage} {outcome}; give its own command again to finish it, or "
            f"with --train-iters {iteration} to end it there"
        )


def _read(directory: str) -> tuple[CheckedCheckpoint, Any]:
    """What Megatron will load, after it was checked, and the settings stored in it."""
    from megatron_dmc.checkpoint.guard import examine
    from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments

    checkpoint = examine(directory)
    location = checkpoint.location
    if location.directory == location.root:
        raise ValueError(f"{directory} is a published release: bring it into Megatron's layout with `convert` first")
    return checkpoint, read_saved_arguments(Path(directory))


def _resume(settings: DMCConfig, save: str) -> Start:
    checkpoint, stored = _read(save)
    saved = stored.dmc or DMCConfig(stage=OFF.name)
    different = [
        f"dmc_{field.name}: {getattr(saved, field.name)!r} there, {getattr(settings, field.name)!r} here"
        for field in dataclasses.fields(DMCConfig)
        if field.name not in _MAY_CHANGE and getattr(saved, field.name) != getattr(settings, field.name)
    ]
    if different:
        raise ValueError(
            f"--save {save} holds a run with other settings:\n  "
            + "\n  ".join(different)
            + "\ngive the same settings to continue it, or another --save"
        )
    first_sample = int(stored.args.get("dmc_first_sample") or 0)
    return Start(
        stored.config,
        resumes=True,
        first_sample=first_sample,
        checkpoint=checkpoint,
        origin=_origin(stored.args),
        saved_arguments=stored.args,
    )

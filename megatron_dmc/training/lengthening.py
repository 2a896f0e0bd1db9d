"""A stage that goes on with another length than it began with.

Megatron refuses any other learning-rate schedule than the saved one, and a length is part of it. Where the rate does
not depend on the length, nothing is lost and the refusal is lifted; where it does, the user decides.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.stages import STAGES
from megatron_dmc.training.flag_parser import FlagParser

CONSTANT = "constant"
OVERRIDE = "--override-opt_param-scheduler"
_DECIDED = (
    OVERRIDE,
    "--override-opt-param-scheduler",
    "--use-checkpoint-opt_param-scheduler",
    "--use-checkpoint-opt-param-scheduler",
)
"""Flags by which the user says which schedule holds."""
_SCHEDULE: Mapping[str, Any] = {
    "--lr": None,
    "--min-lr": 0.0,
    "--lr-warmup-iters": 0,
    "--lr-warmup-fraction": None,
    "--weight-decay": 0.01,
    "--global-batch-size": None,
}
"""Numbers of a schedule, with Megatron's defaults."""
_STYLES = {"--lr-decay-style": "linear", "--weight-decay-incr-style": CONSTANT}


@dataclass(frozen=True)
class Lengthening:
    """What a new length asks for.

    Attributes:
        flags: to put before those of the user.
        remark: what it means; None where the length is the old one.
    """

    flags: list[str] = field(default_factory=list)
    remark: str | None = None


def lengthening(argv: Sequence[str], saved: Mapping[str, Any]) -> Lengthening:
    """Compare the length of a run that continues with the one that it began with.

    Args:
        argv: all flags of the run.
        saved: arguments of the run that is continued; empty for one that begins.

    Raises:
        ValueError: the learning rate falls over the length, so that another one would change it.
    """
    given = _read(argv)
    before = saved.get("train_iters")
    if before is None or given.train_iters is None or given.train_iters == before:
        return Lengthening()
    stretched = f"what rises or fades over it is stretched over {given.train_iters} steps"
    paced = "its target goes on rising at the pace of --dmc-steps-per-unit"
    remark = f"the stage began with --train-iters {before}: {paced if _has_its_own_pace(saved) else stretched}"
    if given.dmc_total_samples is None:
        remark += "; without --dmc-total-samples the data may come in another order from here on"
    # Anything else that differs is for Megatron to refuse.
    if given.decided or not _same_schedule(given, saved):
        return Lengthening(remark=remark)
    if given.lr_decay_style != CONSTANT and given.lr_decay_iters != saved.get("lr_decay_iters"):
        raise ValueError(
            f"--train-iters {given.train_iters}: the stage began with {before}, over which its learning rate falls "
            f"({given.lr_decay_style}); give {OVERRIDE} to follow the curve of the new length from here on, or "
            f"--lr-decay-iters {saved.get('lr_decay_iters') or before} to stay on the old one and end at its last rate"
        )
    return Lengthening([OVERRIDE], f"{remark}; the learning rate does not depend on the length")


def _has_its_own_pace(saved: Mapping[str, Any]) -> bool:
    """Whether what changes in the stage depends on its steps, not on its length."""
    stage = STAGES.get(str(saved.get("dmc_stage")))
    return stage is not None and stage.raises_target and saved.get("dmc_steps_per_unit") is not None


def _read(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser()
    for flag in ("--train-iters", "--lr-decay-iters", "--dmc-total-samples"):
        parser.add_argument(flag, type=int)
    for flag, default in _SCHEDULE.items():
        parser.add_argument(flag, type=float, default=default)
    for flag, style in _STYLES.items():
        parser.add_argument(flag, default=style)
    for flag in _DECIDED:
        parser.add_argument(flag, dest="decided", action="store_true")
    return parser.parse_known_args(argv)[0]


def _same_schedule(given: argparse.Namespace, saved: Mapping[str, Any]) -> bool:
    """Whether the schedules differ in nothing but their length."""
    names = [flag[2:].replace("-", "_") for flag in (*_SCHEDULE, *_STYLES)]
    return given.lr_warmup_fraction is None and all(getattr(given, name) == saved.get(name) for name in names)

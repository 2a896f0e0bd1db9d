"""What is watched after every step: one JSON line, the ratio beside its target, and the reasons to stop early."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, print_rank_last

from megatron_dmc.runs.metrics import MetricsFile
from megatron_dmc.seam import megatron_compat
from megatron_dmc.stages import find_stage
from megatron_dmc.training.ratio_watch import RatioWatch, RunningRatio

_STOP_WINDOW_STEPS = 10
_STOP_FILE, _RATIO_REACHED = 1, 2
"""Reasons to stop; the larger one holds where ranks see different ones."""

LOGGED_NAMES = {
    "lm_loss": "lm loss",
    "distillation_loss": "distillation loss",
    "compression_loss": "compression loss",
    "measured_cr": "compression ratio",
    "target_cr": "target ratio",
}
"""Keys of a metrics line -> names in Megatron's log line and in TensorBoard."""


class StepRecorder:
    """Receives Megatron's per-step log.

    Args:
        save: directory of the stage's checkpoints, where ``metrics.jsonl`` is written; None writes nothing.

    Attributes:
        iteration: the last step done by this process; None before the first.
    """

    def __init__(self, save: str | None) -> None:
        self._file = MetricsFile(Path(save)) if save else None
        self._last_time = time.monotonic()
        self._watch = RatioWatch()
        self.recent_ratio = RunningRatio(_STOP_WINDOW_STEPS)
        self.iteration: int | None = None

    def __call__(self, logged: dict[str, Any]) -> None:
        """Take in the arguments of ``training_log`` by name; only ranks of the last pipeline stage have losses."""
        self.iteration = logged["iteration"]
        losses = logged["loss_dict"]
        now = time.monotonic()
        seconds, self._last_time = now - self._last_time, now
        if not losses:
            return
        values = {key: float(losses[name]) for key, name in LOGGED_NAMES.items() if name in losses}
        if "measured_cr" in values:
            self._observe_ratio(values["measured_cr"], values["target_cr"])
        if self._file is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            self._file.add({**values, **_position(logged), "step_seconds": seconds})

    def _observe_ratio(self, measured: float, target: float) -> None:
        self.recent_ratio.observe(measured)
        if advice := self._watch.observe(measured, target):
            print_rank_last(f"warning: {advice}")


def _position(logged: dict[str, Any]) -> dict[str, Any]:
    args = get_args()
    grad_norm, learning_rate = logged["grad_norm"], logged["learning_rate"]
    return {
        "step": logged["iteration"],
        "stage": args.dmc_stage,
        "learning_rate": learning_rate,
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "consumed_samples": args.consumed_train_samples,
    }


class StopDecision:
    """Whether the run should save and leave: a stop file has appeared, or the ratio to stop at is reached.

    Attributes:
        ratio_reached: the ratio was the reason to leave, on every rank alike.
    """

    def __init__(self, recent_ratio: RunningRatio, stop_file: str | None, stop_at_cr: float | None) -> None:
        self._recent_ratio, self._stop_file, self._stop_at_cr = recent_ratio, stop_file, stop_at_cr
        self.ratio_reached = False

    def __call__(self, iteration: int) -> bool:
        """After a step: the same answer on every rank."""
        if self._stop_file is None and self._stop_at_cr is None:
            return False
        reason = torch.tensor(self._own_reason(), dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(reason, op=torch.distributed.ReduceOp.MAX)
        self.ratio_reached = reason.item() == _RATIO_REACHED
        return bool(reason.item())

    def _own_reason(self) -> int:
        if self._stop_at_cr is not None and self._recent_ratio.reached(self._stop_at_cr):
            return _RATIO_REACHED
        return _STOP_FILE if self._stop_file is not None and os.path.exists(self._stop_file) else 0


def watch_steps(args: Any) -> tuple[StepRecorder, StopDecision]:
    """Hook this package into Megatron's training loop: ``metrics.jsonl`` in ``--save``, and early stops.

    Args:
        args: Megatron's parsed arguments with ``--dmc-*``.

    Returns:
        what was watched, to be asked afterwards: how far the run came, and whether the ratio ended it.
    """
    recorder = StepRecorder(args.save)
    stop_at_cr = args.dmc_stop_at_cr if find_stage(args.dmc_stage).raises_target else None
    decision = StopDecision(recorder.recent_ratio, args.dmc_stop_file or None, stop_at_cr)
    megatron_compat.after_each_step(recorder)
    megatron_compat.stop_when(decision)
    return recorder, decision

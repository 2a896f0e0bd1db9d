"""One JSON line per step, the watch over the ratio, and the reasons to stop early."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from megatron.training import get_args, print_rank_last

from megatron_dmc.runs.metrics import MetricsFile
from megatron_dmc.training.ratio_watch import RatioWatch

_STOP_WINDOW_STEPS = 10

LOGGED_NAMES = {
    "lm_loss": "lm loss",
    "compression_loss": "compression loss",
    "measured_cr": "compression ratio",
    "target_cr": "target ratio",
}
"""Keys of a metrics line -> names in Megatron's log line and in TensorBoard."""


class StepRecorder:
    """Receives Megatron's per-step log.

    Args:
        save: directory of the stage's checkpoints, where ``metrics.jsonl`` is written; None writes nothing.
    """

    def __init__(self, save: str | None) -> None:
        self._file = MetricsFile(Path(save)) if save else None
        self._last_time = time.monotonic()
        self._watch = RatioWatch()
        self._recent = RatioWatch(_STOP_WINDOW_STEPS)
        self._recent_steps = 0

    def __call__(self, logged: dict[str, Any]) -> None:
        """Take in the arguments of ``training_log`` by name; only ranks of the last pipeline stage have losses."""
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

    def reached(self, ratio: float) -> bool:
        """Whether the mean ratio of the last steps on this rank is at least ``ratio``."""
        return self._recent_steps >= _STOP_WINDOW_STEPS and self._recent.ratio() >= ratio

    def _observe_ratio(self, measured: float, target: float) -> None:
        self._recent.observe(measured, target)
        self._recent_steps += 1
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


def stop_decision(recorder: StepRecorder) -> Any:
    """A function of the iteration that is true, on every rank alike, when the run should save and leave."""
    args = get_args()

    def decide(iteration: int) -> bool:
        wanted = bool(args.dmc_stop_file) and os.path.exists(args.dmc_stop_file)
        if args.dmc_stop_at_cr is not None and args.dmc_stage == "retrofit":
            wanted = wanted or recorder.reached(args.dmc_stop_at_cr)
        elif not args.dmc_stop_file:
            return False
        flag = torch.tensor([int(wanted)], dtype=torch.int32, device=torch.cuda.current_device())
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    return decide

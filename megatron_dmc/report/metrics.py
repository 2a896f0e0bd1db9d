"""Reads what training wrote: one ``metrics.jsonl`` per stage directory, complete or still growing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.runs.directory import METRICS_FILE

CONTROL_PREFIX = "control"
COMPRESSING_ORDER = ("zero_out", "retrofit", "consolidate")


@dataclass(frozen=True)
class StageMetrics:
    """The steps of one stage so far.

    Attributes:
        name: of its directory; a control's begins with ``control``.
        stage: ``zero_out``, ``retrofit``, ``consolidate`` or ``off``.
        steps: one dictionary per step: ``step``, ``lm_loss``, and where they exist ``measured_cr``, ``target_cr``, ...
    """

    name: str
    stage: str
    steps: tuple[dict[str, Any], ...]

    @property
    def length(self) -> int:
        """Steps done."""
        return int(self.steps[-1]["step"])

    @property
    def is_control(self) -> bool:
        """Whether it is training without compression beside the retrofit."""
        return self.name.startswith(CONTROL_PREFIX)


def read_stages(run: Path) -> list[StageMetrics]:
    """All stages below a run directory (or the directory of a single stage), in the order of the samples they saw.

    Raises:
        ValueError: there is no such directory, or a line is not one of ours.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no directory: give the output directory of a run or of a stage")
    found = [_read(path) for path in sorted([*run.glob(METRICS_FILE), *run.glob(f"*/{METRICS_FILE}")])]
    stages = [stage for stage in found if stage.steps]
    return sorted(stages, key=lambda stage: (stage.is_control, stage.steps[0].get("consumed_samples", 0)))


def _read(path: Path) -> StageMetrics:
    steps = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break  # the run is writing it right now
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(values, dict) or not {"step", "stage"} <= values.keys():
            raise ValueError(f"{path}, line {number} has no step and stage: it was not written by megatron-dmc train")
        if "lm_loss" in values:
            steps.append(values)
    stage = steps[0]["stage"] if steps else "off"
    return StageMetrics(path.parent.name, stage, tuple(steps))


@dataclass(frozen=True)
class Curve:
    """Consecutive stages as one line over steps.

    Attributes:
        steps: from the start of the first stage.
        values: one dictionary per step, as in :class:`StageMetrics`.
        borders: step at which each stage starts, with its name.
    """

    steps: list[int]
    values: list[dict[str, Any]]
    borders: list[tuple[int, str]]

    def of(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and values where ``key`` was logged."""
        pairs = [(step, value[key]) for step, value in zip(self.steps, self.values, strict=True) if key in value]
        return [step for step, _ in pairs], [value for _, value in pairs]


def join(stages: list[StageMetrics]) -> Curve:
    """Put stages that followed each other behind one another."""
    curve = Curve([], [], [])
    offset = 0
    for stage in stages:
        curve.borders.append((offset, stage.stage))
        curve.steps.extend(offset + int(values["step"]) for values in stage.steps)
        curve.values.extend(stage.steps)
        offset += stage.length
    return curve


def smoothed(values: Sequence[float], window: int | None = None) -> list[float]:
    """Running mean over the last ``window`` values; None: over a fiftieth of them."""
    window = window or max(1, len(values) // 50)
    result, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        result.append(total / min(index + 1, window))
    return result

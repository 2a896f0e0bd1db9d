"""Metrics of several stages as one line over steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_dmc.runs.metrics import StageMetrics


@dataclass(frozen=True)
class Curve:
    """Consecutive stages as one line over steps.

    Attributes:
        steps: from the start of the first stage.
        values: one dictionary per step, as in ``StageMetrics``.
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

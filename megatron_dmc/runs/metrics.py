"""One JSON line per training step, each step once, also after a kill: ``metrics.jsonl``, written and read here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.runs.layout import METRICS_FILE, is_control
from megatron_dmc.stages import OFF
from megatron_dmc.support.files import to_json, write_text

MEASURED = ("lm_loss", "distillation_loss", "compression_loss", "measured_cr", "target_cr")
"""What a step measures. JSON has no word for a number that is not finite: ``null`` in a line, NaN when it is read."""


class MetricsFile:
    """Appends lines to ``metrics.jsonl`` in ``directory``, or to a file of another name.

    A run that continues repeats the steps after its checkpoint: before the first line is added, old lines of later
    steps are dropped, and one that a kill has cut off.
    """

    def __init__(self, directory: Path, name: str = METRICS_FILE) -> None:
        self._path = directory / name
        self._continues = False

    def add(self, line: dict[str, Any]) -> None:
        """Append ``line``, whose ``step`` is above that of every line kept."""
        if not self._continues:
            self._drop_from(line["step"])
            self._continues = True
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(to_json(line) + "\n")

    def _drop_from(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            write_text(self._path, "".join(line for line in whole if json.loads(line)["step"] < step))


def steps_logged(directory: Path) -> int:
    """Steps that training in ``directory`` has logged so far."""
    metrics = directory / METRICS_FILE
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


@dataclass(frozen=True)
class StageMetrics:
    """The steps of one stage so far.

    Attributes:
        name: of its directory.
        stage: that was trained, as ``--dmc-stage`` names it.
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
        return is_control(self.name)


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
            steps.append(values | {name: math.nan for name in MEASURED if values.get(name, 0) is None})
    stage = steps[0]["stage"] if steps else OFF.name
    return StageMetrics(path.parent.name, stage, tuple(steps))

"""Everything known about one run, read from its directory, as far as the run has come."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.report.curve import Curve, join, smoothed
from megatron_dmc.report.quality import quality
from megatron_dmc.runs.decisions import StageDecisions, read_decisions
from megatron_dmc.runs.layout import DATA_FOLDER, EVALUATION_FOLDER, GENERATION_FILE, RUN_FILE
from megatron_dmc.runs.metrics import StageMetrics, read_stages
from megatron_dmc.stages import STAGES, find_stage, retrofit_order
from megatron_dmc.support.files import read_json
from megatron_dmc.support.findings import Finding

MODELS = ("base", "control", "dmc")
STEPS_OF_A_FINAL_VALUE = 20
FIGURES = ("perplexity", "loss", "loss_standard_error", "largest_log_prob_difference", "mean_log_prob_difference")
"""What an evaluation measures of log-probabilities."""


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        path: its directory.
        run: ``run.json`` (configuration and hash), empty for a directory without one.
        stages: in the order of their samples, the control's last.
        evaluations: results of ``base``, ``control``, ``dmc``, as far as they exist.
        generation: text that was continued, and its cache; empty before.
        data: manifests of the splits; empty where unknown.
        decisions: what every KV head decided over the compressing stages; None where it was not logged.
    """

    path: Path
    run: Mapping[str, Any]
    stages: list[StageMetrics]
    evaluations: Mapping[str, Mapping[str, Any]]
    generation: Mapping[str, Any]
    data: Mapping[str, Any]
    decisions: StageDecisions | None

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        return self.path.resolve().name

    @property
    def retrofit(self) -> Curve:
        """The stages of the retrofit behind one another."""
        return join([stage for stage in self.stages if stage.stage in retrofit_order()])

    @property
    def control(self) -> Curve | None:
        """The control's stages behind one another."""
        stages = [stage for stage in self.stages if stage.is_control]
        return join(stages) if stages else None

    @property
    def target_cr(self) -> float | None:
        """The ratio asked for: from the configuration, else the last one that was logged."""
        configured = self.run.get("configuration", {}).get("recipe", {}).get("dmc", {}).get("target_cr")
        if configured is not None:
            return float(configured)
        _, targets = self.retrofit.of("target_cr")
        return targets[-1] if targets else None

    @property
    def quality(self) -> list[Finding]:
        """Whether the run reached what it had to."""
        return quality(self.evaluations, self.target_cr)


def collect(path: Path) -> RunFacts:
    """Read a run, or the directory of a single stage.

    Raises:
        ValueError: nothing that training or measuring writes is there, or a file is damaged.
    """
    stages = read_stages(path)
    evaluations = {name: _evaluation(path / EVALUATION_FOLDER / f"{name}.json") for name in MODELS}
    facts = RunFacts(
        path=path,
        run=_json(path / RUN_FILE),
        stages=stages,
        evaluations={name: result for name, result in evaluations.items() if result},
        generation=_json(path / GENERATION_FILE),
        data={name: found for name in ("train", "test") if (found := _json(path / DATA_FOLDER / f"{name}.json"))},
        decisions=_decisions(path, stages),
    )
    if not facts.stages and not facts.evaluations:
        raise ValueError(f"{path} holds no metrics and no evaluation: give the output directory of a run or of a stage")
    return facts


def _decisions(path: Path, stages: list[StageMetrics]) -> StageDecisions | None:
    """Those of the compressing stages behind one another."""
    steps: list[int] = []
    shares: list[list[list[float]]] = []
    offset = 0
    for stage in stages:
        if stage.stage not in STAGES or not find_stage(stage.stage).compresses:
            continue
        found = read_decisions(path / stage.name if (path / stage.name).is_dir() else path)
        if found is not None:
            steps += [offset + step for step in found.steps]
            shares += found.shares
        offset += stage.length
    return StageDecisions(steps, shares) if steps else None


def final(stage: StageMetrics, key: str) -> float | None:
    """Mean of ``key`` over the last steps of a stage; None where it was not logged."""
    values = [float(step[key]) for step in stage.steps if step.get(key) is not None]
    return smoothed(values, STEPS_OF_A_FINAL_VALUE)[-1] if values else None


def _evaluation(path: Path) -> dict[str, Any]:
    """One evaluation; where a model has diverged its figures are ``null`` in JSON, and NaN here."""
    found = _json(path)
    for result in filter(None, map(found.get, ("teacher_forced", "decode", "agreement"))):
        result |= {name: math.nan for name in FIGURES if result.get(name, 0) is None}
    return found


def _json(path: Path) -> dict[str, Any]:
    """What was measured, not a number where a model has diverged; empty where there is no file."""
    return read_json(path, finite=False) if path.is_file() else {}

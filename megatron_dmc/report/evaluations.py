"""Results of ``evaluate`` and ``eval`` from several files, as lines of quality over compression ratio."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dmc.support.files import read_json
from megatron_dmc.support.units import amount

INTERVAL = 1.96
"""Standard errors on both sides of a mean: 95% of a normal distribution."""
TEXT_METRICS = {
    "perplexity": "perplexity",
    "perplexity_ratio": "perplexity / the reference's",
    "mean_kl": "mean KL from the reference\n[nats per token]",
    "top1_agreement": "same most likely token\nas the reference",
}


class Point(NamedTuple):
    """One result."""

    ratio: float
    value: float
    half_interval: float
    """Not a number where a single sequence says nothing of it."""
    entries: float
    """Mean per layer and KV head that the ratio stands for."""
    bytes_held: float | None
    """Of one sequence; None where there was no cache."""


@dataclass(frozen=True)
class Measured:
    """One number of one result file.

    Attributes:
        chart: what is compared together: texts of one length, tasks of one length, or benchmarks.
        metric: name of the panel.
        method: whose line it is a point of.
        tokens: that the model was trained on; None: not stated.
        path: ``decode`` or ``teacher-forced``.
        point: the number.
    """

    chart: str
    metric: str
    method: str
    tokens: int | None
    path: str
    point: Point


def read_measured(paths: Sequence[Path]) -> list[Measured]:
    """Everything that is measured in result files.

    Raises:
        ValueError: a file that holds no result of ``evaluate`` or ``eval``.
    """
    found: list[Measured] = []
    for path in paths:
        result = read_json(path, finite=False)
        try:
            one = [*_texts(result), *_tasks(result), *_benchmarks(result)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is a result of an older release or damaged ({error}): measure again") from error
        if not one:
            raise ValueError(f"{path} holds no result: give what megatron-dmc evaluate --json or eval --json printed")
        found += one
    return found


def trained(tokens: Sequence[int | None]) -> str:
    """What is said of the training of one or several models."""
    stated = sorted({count for count in tokens if count is not None})
    if not stated or None in tokens:
        return "training not stated"
    if stated == [0]:
        return "not trained"
    if len(stated) == 1:
        return f"{amount(stated[0], 'tokens')} trained"
    return f"{stated[0]:,} to {amount(stated[-1], 'tokens')} trained"


def lines(measured: Sequence[Measured], chart: str) -> dict[str, dict[str, list[Point]]]:
    """Metric -> line -> its points by ratio, of one chart: a line for every method, with the tokens of its points."""
    of_chart = [one for one in measured if one.chart == chart]
    tokens: dict[str, list[int | None]] = {}
    for one in of_chart:
        tokens.setdefault(one.method, []).append(one.tokens)
    panels: dict[str, dict[str, list[Point]]] = {}
    for one in of_chart:
        line = f"{one.method} ({trained(tokens[one.method])})"
        panels.setdefault(one.metric, {}).setdefault(line, []).append(one.point)
    for points in (points for panel in panels.values() for points in panel.values()):
        points.sort()
    return panels


def _model(result: Mapping[str, Any]) -> tuple[str, int | None]:
    """Method and tokens trained."""
    return result.get("name") or "unnamed", result.get("tokens_trained")


def _texts(result: Mapping[str, Any]) -> Iterator[Measured]:
    """Of ``evaluate``: decoding where it was measured, for its cache is real."""
    evaluations = result.get("evaluations", [result] if "seq_length" in result else [])
    for evaluation in evaluations:
        name = "decode" if evaluation["decode"] else "teacher_forced"
        path = evaluation[name]
        figures = path["against_reference"] or {
            "perplexity": path["perplexity"],
            "perplexity_standard_error": path["perplexity"] * path["loss_standard_error"],
        }
        for key, meaning in TEXT_METRICS.items():
            if figures.get(key) is not None:
                point = Point(
                    path["mean_resident_ratio"],
                    figures[key],
                    INTERVAL * (figures[f"{key}_standard_error"] or math.nan),
                    path["mean_resident_entries"],
                    path["mean_resident_bytes"],
                )
                chart = f"text_{evaluation['seq_length']}"
                yield Measured(chart, meaning, *_model(result), name.replace("_", "-"), point)


def _tasks(result: Mapping[str, Any]) -> Iterator[Measured]:
    """Of ``eval``: the generated tasks."""
    for task in result.get("generated_tasks", []):
        point = Point(
            task["compression_ratio"],
            task["score"],
            INTERVAL * task["score_standard_error"],
            task["entries_at_the_end"],
            task["bytes_at_the_end"],
        )
        yield Measured(f"tasks_{task['length']}", task["task"], *_model(result), "decode", point)


def _benchmarks(result: Mapping[str, Any]) -> Iterator[Measured]:
    """Of ``eval``: the first metric of each benchmark; of one that is several tasks, their mean."""
    found = result.get("standard_tasks")
    if not found:
        return
    groups = found["groups"]
    alone = {
        name: task for name, task in found["tasks"].items() if not any(name.startswith(f"{group}_") for group in groups)
    }
    cache = found["cache"]
    heads = len(cache["per_layer_and_kv_head"]["entries"]) * len(cache["per_layer_and_kv_head"]["entries"][0])
    for name, task in {**groups, **alone}.items():
        metric = next(key for key in task["metrics"] if "_stderr" not in key)
        error = task["metrics"].get(metric.replace(",", "_stderr,"))
        point = Point(
            cache["compression_ratio"],
            task["metrics"][metric],
            INTERVAL * error if isinstance(error, float) else math.nan,
            cache["entries"] / cache["num_sequences"] / heads,
            cache["bytes"] / cache["num_sequences"],
        )
        path = found["path_of_texts" if metric.startswith(("exact_match", "pass@1")) else "path_of_scores"]
        yield Measured("benchmarks", f"{name}, {metric.split(',')[0]}", *_model(result), path, point)

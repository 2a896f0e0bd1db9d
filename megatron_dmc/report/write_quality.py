"""Writes ``quality.md``, ``quality.json`` and pictures: results of several methods over their compression ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_dmc.report import words
from megatron_dmc.report.evaluations import Measured, lines, read_measured, trained
from megatron_dmc.report.requirements import require_matplotlib
from megatron_dmc.support.files import write_json, write_text
from megatron_dmc.support.units import binary_bytes

HEADS = ("method", "path", "compression ratio", "entries per head", "cache")
NOTE = (
    "The ratio of texts is that of the mean number of resident entries over all positions, that of tasks and "
    "benchmarks is taken at the end of the answers: compare methods at equal ratios. Intervals are over sequences or "
    "questions of one data set and one training run, by a normal distribution: too narrow for a few of them. The ratio "
    "to the reference's perplexity is paired, text by text."
)


def write_quality(results: Sequence[Path], output: Path) -> Path:
    """Compare result files of ``evaluate --json`` and ``eval --json``.

    Args:
        results: files; those of one name are points of one line.
        output: directory; files in it are replaced.

    Returns:
        The page that was written.

    Raises:
        ValueError: a file without results, or no matplotlib.
    """
    require_matplotlib()
    from megatron_dmc.report.task_figures import quality_figure

    measured = read_measured(results)
    output.mkdir(parents=True, exist_ok=True)
    page = ["# Quality over compression ratio", "", NOTE, ""]
    for chart in dict.fromkeys(one.chart for one in measured):
        picture = f"quality_{chart}.png"
        title = _title(chart)
        quality_figure(output / picture, title, lines(measured, chart))
        table = _table([one for one in measured if one.chart == chart])
        page += [f"## {title}", "", f"![{picture}]({picture})", "", *table, ""]
    write_json(output / "quality.json", {"results": [asdict(one) for one in measured]})
    write_text(output / "quality.md", "\n".join(page))
    return output / "quality.md"


def _title(chart: str) -> str:
    """What was read: ``text_512`` -> 512 tokens of text."""
    kind, _, length = chart.partition("_")
    if not length:
        return "Benchmarks"
    return f"{int(length):,} tokens of {'text' if kind == 'text' else 'prompt and answer'}"


def _table(measured: Sequence[Measured]) -> list[str]:
    """A line for each method and ratio, a column for each measure with its 95% interval."""
    metrics = list(dict.fromkeys(one.metric for one in measured))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for one in measured:
        point = one.point
        held = "no cache on this path" if point.bytes_held is None else binary_bytes(int(point.bytes_held))
        key = (f"{one.method} ({trained([one.tokens])})", one.path, f"{point.ratio:.2f}", f"{point.entries:.1f}", held)
        interval = "" if math.isnan(point.half_interval) else f" ± {point.half_interval:.4f}"
        rows.setdefault(key, {})[one.metric] = f"{point.value:.4f}{interval}"
    heads = [*HEADS, *(metric.replace("\n", " ") for metric in metrics)]
    return words.table(heads, [[*key, *(found.get(metric, "") for metric in metrics)] for key, found in rows.items()])

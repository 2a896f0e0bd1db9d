"""Writes ``report.md``, ``report.json`` and the pictures of one or several runs."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_dmc import __version__
from megatron_dmc.report import words
from megatron_dmc.report.collect import RunFacts, collect
from megatron_dmc.report.requirements import require_matplotlib
from megatron_dmc.support.files import write_json, write_text

MARKS = {"ok": "passed", "warning": "open", "failed": "**failed**"}


def write_report(runs: Sequence[Path], output: Path) -> list[RunFacts]:
    """Report on runs, finished or not.

    Args:
        runs: output directories.
        output: directory for the report; files in it are replaced.

    Raises:
        ValueError: a directory without anything to report, two runs of one name, or no matplotlib.
    """
    require_matplotlib()
    collected = [collect(path) for path in runs]
    names = [facts.name for facts in collected]
    if len(set(names)) < len(names):
        raise ValueError(f"runs {', '.join(names)}: give runs whose directories have different names")
    output.mkdir(parents=True, exist_ok=True)
    lines = [] if len(collected) == 1 else ["# Runs", "", *_comparison(collected), ""]
    for facts in collected:
        prefix = "" if len(collected) == 1 else f"{facts.name}_"
        lines += _section(facts, _draw(facts, output, prefix))
    write_text(output / "report.md", "\n".join(lines) + "\n")
    write_json(output / "report.json", {"runs": [_facts(facts) for facts in collected]})
    return collected


def _draw(facts: RunFacts, output: Path, prefix: str) -> list[str]:
    """Draw what there is to see; names of the pictures."""
    from megatron_dmc.report import figures

    drawn = []
    if facts.retrofit.steps:
        drawn.append(f"{prefix}training.png")
        figures.training_figure(
            output / drawn[-1], "\n".join(words.training_findings(facts)), facts.retrofit, facts.control
        )
    if facts.decisions is not None:
        ratios = [[[1 / max(1 - share, 1e-3) for share in row] for row in step] for step in facts.decisions.shares]
        drawn.append(f"{prefix}ratio_while_training.png")
        title = "At the end of training: " + words.heat_map_title(ratios[-1])
        figures.heads_figure(output / drawn[-1], title, facts.decisions.steps, ratios)
    decode = facts.evaluations.get("dmc", {}).get("decode")
    if decode is not None:
        ratios_LG = decode["compression_ratio_per_layer_and_kv_head"]
        drawn.append(f"{prefix}ratio_by_layer_and_head.png")
        figures.heat_map(output / drawn[-1], words.heat_map_title(ratios_LG), ratios_LG)
        heads = len(ratios_LG) * len(ratios_LG[0])
        tokens, entries = zip(*decode["entries_over_tokens"], strict=True)
        entries_per_head = [count / heads for count in entries]
        drawn.append(f"{prefix}cache_while_decoding.png")
        title = words.cache_title(tokens[-1], entries_per_head[-1])
        figures.cache_figure(output / drawn[-1], title, tokens, entries_per_head)
    return drawn


def _section(facts: RunFacts, pictures: Sequence[str]) -> list[str]:
    lines = [f"# {facts.name}", "", " ".join(words.training_findings(facts)), ""]
    checks = [(finding.name, MARKS[finding.status], finding.detail) for finding in facts.quality]
    lines += [*words.table(("what must hold", "", "found"), checks), ""]
    if facts.evaluations:
        lines += ["## Held-out text", "", *words.table(words.RESULT_HEADS, words.result_rows(facts)), ""]
    lines += [line for name in pictures for line in (f"![{name}]({name})", "")]
    if facts.stages:
        lines += ["## Stages", "", "Means over the last steps of each stage.", "", *words.stage_table(facts), ""]
    if facts.generation:
        lines += ["## Generated text", ""]
        for result in facts.generation["results"]:
            lines += ["```text", result["prompt"] + result["text"], "```", ""]
    return [*lines, "## Origin", "", *words.table(("what", "value"), _origin(facts)), ""]


def _origin(facts: RunFacts) -> list[tuple[str, str]]:
    rows = [(name, version) for name, version in _versions().items()]
    if facts.run:
        rows.insert(0, ("configuration (SHA-256)", facts.run["sha256"]))
    if facts.data:
        train = facts.data["train"]
        rows += [("text (SHA-256)", train["corpus_sha256"]), ("tokenizer (SHA-256)", train["tokenizer_sha256"])]
        rows += [(f"{name} tokens", f"{manifest['num_tokens']:,}") for name, manifest in facts.data.items()]
    return rows


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in ("megatron-core", "torch")}
    return {"megatron_dmc": __version__, **packages, "Python": platform.python_version()}


def _comparison(runs: Sequence[RunFacts]) -> list[str]:
    rows = []
    for facts in runs:
        dmc = facts.evaluations.get("dmc")
        perplexity = f"{dmc['teacher_forced']['perplexity']:.3f}" if dmc else ""
        ratio = f"{dmc['decode']['compression_ratio']:.2f}" if dmc and dmc["decode"] else ""
        target = "" if facts.target_cr is None else f"{facts.target_cr:g}"
        rows.append((facts.name, target, ratio, perplexity, str(sum(stage.length for stage in facts.stages))))
    return words.table(("run", "target ratio", "measured ratio", "DMC perplexity", "steps of all stages"), rows)


def _facts(facts: RunFacts) -> dict[str, Any]:
    return {
        "name": facts.name,
        **facts.run,
        "versions": _versions(),
        "target_cr": facts.target_cr,
        "quality": [asdict(finding) for finding in facts.quality],
        "evaluations": facts.evaluations,
        "generation": facts.generation,
        "data": facts.data,
        "stages": [
            {"name": stage.name, "stage": stage.stage, "steps": stage.length, "last": stage.steps[-1]}
            for stage in facts.stages
        ],
    }

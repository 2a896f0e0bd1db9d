"""What a run found, in sentences and tables: the titles of its pictures and the text of ``report.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from megatron_dmc.report.collect import RunFacts, final
from megatron_dmc.report.curve import Curve, smoothed

MODEL_NAMES = {"base": "base", "control": "control, no compression", "dmc": "DMC"}


def training_findings(facts: RunFacts) -> list[str]:
    """The end of training, in at most two sentences."""
    retrofit, control = facts.retrofit, facts.control
    parts = _diverged(facts)
    ratio = _last(retrofit, "measured_cr")
    if ratio is not None:
        target = f" (target {facts.target_cr:g})" if facts.target_cr is not None else ""
        parts.append(f"The cache shrinks {ratio:.1f}-fold in training{target}.")
    parts += _loss_against_control(retrofit, control)
    return parts or ["Training has not compressed yet."]


def _diverged(facts: RunFacts) -> list[str]:
    """Stages whose loss left the numbers, with the first such step."""
    found = []
    for stage in facts.stages:
        first = next((step["step"] for step in stage.steps if not isfinite(step["lm_loss"])), None)
        if first is not None:
            found.append(f"The LM loss of {stage.name} is not finite from step {first} on.")
    return found


def _loss_against_control(retrofit: Curve, control: Curve | None) -> list[str]:
    """Both losses at the last step that both have seen."""
    if control is None or not control.steps or not retrofit.steps:
        return []
    shared = min(control.steps[-1], retrofit.steps[-1])
    ours, theirs = (_at(curve, "lm_loss", shared) for curve in (retrofit, control))
    if ours is None or theirs is None or not isfinite(ours - theirs):
        return []
    side = "above" if ours >= theirs else "below"
    return [f"After {shared} steps the LM loss is {abs(ours - theirs):.3f} nats {side} the control's."]


def heat_map_title(ratios_LG: Sequence[Sequence[float]]) -> str:
    """The extremes among layers and KV heads."""
    cells = [(ratio, layer, head) for layer, row in enumerate(ratios_LG) for head, ratio in enumerate(row)]
    low, high = min(cells), max(cells)
    return (
        f"Most compressed: layer {high[1]}, KV head {high[2]} ({high[0]:.1f} tokens per entry); "
        f"least: layer {low[1]}, KV head {low[2]} ({low[0]:.1f})"
    )


def cache_title(tokens: int, entries: float) -> str:
    """The cache at the end of a text."""
    fewer = f"{tokens / entries:.1f} times fewer"
    return f"After {tokens} tokens the cache holds {entries:.0f} entries instead of {tokens}: {fewer}"


RESULT_HEADS = ("model", "path", "perplexity ± standard error", "compression ratio", "cache bytes")
PATHS = {"teacher_forced": "whole sequences", "decode": "token by token, through the cache"}


def result_rows(facts: RunFacts) -> list[tuple[str, ...]]:
    """Perplexity and cache of each model that was measured, by each path."""
    rows: list[tuple[str, ...]] = []
    for name, evaluation in facts.evaluations.items():
        for path, meaning in PATHS.items():
            result = evaluation[path]
            if result is None:
                continue
            cache = result["cache"]
            held = f"{cache['bytes']:,} of {cache['uncompressed_bytes']:,}" if cache else "no cache on this path"
            deviation = result["perplexity"] * result["loss_standard_error"]
            rows.append(
                (
                    MODEL_NAMES[name],
                    meaning,
                    f"{result['perplexity']:.3f} ± {deviation:.3f}",
                    f"{result['compression_ratio']:.2f}",
                    held,
                )
            )
    return rows


def stage_table(facts: RunFacts) -> list[str]:
    """Markdown: the length and the last values of each stage."""
    rows = [
        (
            stage.name,
            str(stage.length),
            *(_number(final(stage, key)) for key in ("lm_loss", "measured_cr", "target_cr", "step_seconds")),
        )
        for stage in facts.stages
    ]
    heads = ("stage", "steps", "LM loss", "ratio in training", "its target", "seconds per step")
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return ["| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _last(curve: Curve, key: str) -> float | None:
    return _at(curve, key, curve.steps[-1]) if curve.steps else None


def _at(curve: Curve, key: str, last_step: int) -> float | None:
    """Running mean of ``key`` at ``last_step``."""
    values = [value for step, value in zip(*curve.of(key), strict=True) if step <= last_step]
    return smoothed(values)[-1] if values else None

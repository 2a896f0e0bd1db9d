"""The pictures of a report. Titles say what was found, lines carry their names, axes their units."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from megatron_dmc.report.curve import Curve, smoothed

WIDTH_INCHES = 9.0
DOTS_PER_INCH = 130
PANEL_POINTS = 190.0
LABEL_HEIGHT = 0.08
LABEL_WIDTH = 0.12
TITLE_CHARACTERS_PER_INCH = 9.5
COMPRESSED = "#c2410c"
UNCOMPRESSED = "#1d4ed8"
QUIET = "#6b7280"


def training_figure(path: Path, title: str, retrofit: Curve, control: Curve | None) -> None:
    """LM loss, KL from a teacher where there was one, and compression ratio over the steps of all stages."""
    taught = retrofit.of("distillation_loss")
    panels = 3 if taught[0] else 2
    size = (WIDTH_INCHES, 0.5 + 3.0 * panels)
    figure, (top, *middle, bottom) = plt.subplots(panels, 1, sharex=True, figsize=size, layout="constrained")
    set_title(figure, title)
    losses = [_line(top, retrofit.of("lm_loss"), "retrofit", COMPRESSED, values=False)]
    if control is not None:
        losses.append(_line(top, control.of("lm_loss"), "control", UNCOMPRESSED, values=False))
    _label_ends(top, losses)
    top.set_ylabel("LM loss, running mean\n[nats per token]")
    for axes in middle:
        _label_ends(axes, [_line(axes, taught, "retrofit", COMPRESSED, values=False)])
        axes.set_ylabel("KL from the teacher, running mean\n[nats per token]")
        axes.set_ylim(bottom=0)
    ratios = [
        _line(bottom, retrofit.of("target_cr"), "target", QUIET, linestyle="--"),
        _line(bottom, retrofit.of("measured_cr"), "measured", COMPRESSED),
    ]
    _label_ends(bottom, ratios)
    bottom.set_ylabel("compression ratio\n[tokens per token that appends or stays]")
    bottom.set_xlabel("training steps since the start of the retrofit")
    for axes in (top, *middle, bottom):
        axes.margins(x=0.01)
        _mark_stages(axes, retrofit.borders, names=axes is top)
    save(figure, path)


def heat_map(path: Path, title: str, ratios_LG: Sequence[Sequence[float]]) -> None:
    """Compression ratio of every layer (rows) and KV head (columns) on one logarithmic scale from 1."""
    layers, heads = len(ratios_LG), len(ratios_LG[0])
    size = (max(7.5, 1.6 + 0.75 * heads), max(3.2, 1.5 + 0.42 * layers))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    set_title(figure, title)
    highest = max(max(row) for row in ratios_LG)
    scale = LogNorm(vmin=1.0, vmax=max(highest, 2.0))
    image = axes.imshow(ratios_LG, cmap="viridis", norm=scale, aspect="auto")
    axes.set_xlabel("KV head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if layers * heads <= 400:
        for layer, row in enumerate(ratios_LG):
            for head, ratio in enumerate(row):
                color = "black" if scale(ratio) > 0.6 else "white"
                axes.text(head, layer, f"{ratio:.1f}", ha="center", va="center", color=color, fontsize=9)
    _ratio_bar(figure, axes, image, highest)
    save(figure, path)


def heads_figure(path: Path, title: str, steps: Sequence[int], ratios: Sequence[Sequence[Sequence[float]]]) -> None:
    """Compression ratio of every KV head (rows, layer by layer) while training (columns), on a logarithmic scale."""
    num_layers, num_heads = len(ratios[0]), len(ratios[0][0])
    figure, axes = plt.subplots(
        figsize=(WIDTH_INCHES, max(3.6, 1.6 + 0.09 * num_layers * num_heads)), layout="constrained"
    )
    set_title(figure, title)
    rows = [[step[layer][head] for step in ratios] for layer in range(num_layers) for head in range(num_heads)]
    highest = max(max(row) for row in rows)
    extent = (steps[0] - 0.5, steps[-1] + 0.5, num_layers * num_heads - 0.5, -0.5)
    scale = LogNorm(vmin=1.0, vmax=max(highest, 2.0))
    image = axes.imshow(rows, cmap="viridis", norm=scale, aspect="auto", extent=extent, interpolation="nearest")
    middle = (num_heads - 1) / 2
    axes.set_yticks([layer * num_heads + middle for layer in range(num_layers)], labels=map(str, range(num_layers)))
    for layer in range(1, num_layers):
        axes.axhline(layer * num_heads - 0.5, color="white", linewidth=0.5)
    axes.set_ylabel("layer, and its KV heads below one another")
    axes.set_xlabel("training steps since the start of compression")
    _ratio_bar(figure, axes, image, highest)
    save(figure, path)


def cache_figure(path: Path, title: str, tokens: Sequence[int], entries: Sequence[float]) -> None:
    """Cache entries per layer and KV head against tokens seen while decoding, beside the uncompressed line."""
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 4.6), layout="constrained")
    set_title(figure, title)
    axes.plot(tokens, tokens, color=UNCOMPRESSED)
    axes.plot(tokens, entries, color=COMPRESSED)
    axes.fill_between(tokens, entries, tokens, color=QUIET, alpha=0.12, linewidth=0)
    axes.set_xlabel("tokens seen while decoding")
    axes.set_ylabel("cache entries\n[mean over layers and KV heads]")
    axes.set_xlim(left=tokens[0], right=tokens[-1])
    axes.set_ylim(bottom=0)
    above = int(0.8 * (len(tokens) - 1))
    name = "uncompressed: one entry per token"
    _label(axes, name, (tokens[above], tokens[above]), (-8, 4), UNCOMPRESSED, ha="right")
    name = f"compressed: {entries[-1]:.0f} entries after {tokens[-1]} tokens"
    _label(axes, name, (tokens[-1], entries[-1]), (-8, 10), COMPRESSED, ha="right")
    save(figure, path)


def _ratio_bar(figure: Figure, axes: Axes, image: AxesImage, highest: float) -> None:
    """A scale of ratios with a tick at every doubling."""
    bar = figure.colorbar(image, ax=axes, label="tokens per cache entry\n(1 = uncompressed)")
    doublings = [2**power for power in range(int(math.log2(max(highest, 2.0))) + 1)]
    bar.set_ticks(doublings, labels=[str(ratio) for ratio in doublings])
    bar.ax.minorticks_off()


def _line(
    axes: Axes,
    points: tuple[Sequence[int], Sequence[float]],
    name: str,
    color: str,
    linestyle: str = "-",
    *,
    values: bool = True,
) -> tuple[str, str, int, float] | None:
    """The running mean boldly and, where asked for, the values faintly. Returns name, color and end of the line.

    Losses of small batches scatter far more than anything that is learned: there the mean stands alone.
    """
    steps, found = points
    if not steps:
        return None
    mean = smoothed(found)
    if values:
        axes.plot(steps, found, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, mean, color=color, linewidth=1.6, linestyle=linestyle)
    return name, color, steps[-1], mean[-1]


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, int, float] | None]) -> None:
    """The name and last value of each line at its right end, pushed apart where two would meet."""
    low, high = axes.get_ylim()
    lowest_free = low
    for name, color, step, value in sorted((end for end in ends if end is not None), key=lambda end: end[3]):
        height = max(value, lowest_free)
        lowest_free = height + LABEL_HEIGHT * (high - low)
        offset = (8, -4 + (height - value) / (high - low) * PANEL_POINTS)
        _label(axes, f"{name} {value:.2f}", (step, value), offset, color)


def _label(
    axes: Axes, text: str, point: tuple[float, float], offset: tuple[float, float], color: str, ha: str = "left"
) -> None:
    axes.annotate(text, point, offset, textcoords="offset points", color=color, ha=ha, annotation_clip=False)


def _mark_stages(axes: Axes, borders: Sequence[tuple[int, str]], *, names: bool) -> None:
    """A dotted line where each stage begins, its name above; the name goes one line up where the last one is near."""
    left, right = axes.get_xlim()
    before, raised = -math.inf, False
    for step, stage in borders:
        axes.axvline(step, color=QUIET, linewidth=0.8, linestyle=":")
        raised = not raised and step - before < LABEL_WIDTH * (right - left)
        before = step
        if names:
            axes.annotate(
                stage,
                (step, 1.0),
                (3, 14 if raised else 2),
                xycoords=axes.get_xaxis_transform(),
                textcoords="offset points",
                color=QUIET,
            )


def set_title(figure: Figure, title: str) -> None:
    """What was found, in one or two lines above a figure."""
    lines = textwrap.fill(title, int(TITLE_CHARACTERS_PER_INCH * figure.get_figwidth()))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=12, fontweight="bold")


def save(figure: Figure, path: Path) -> None:
    """Write a figure and forget it."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=DOTS_PER_INCH)
    plt.close(figure)

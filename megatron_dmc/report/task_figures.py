"""Pictures of evaluations: scores of long-context tasks, and quality over compression ratio."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from megatron_dmc.report.evaluations import Point
from megatron_dmc.report.figures import WIDTH_INCHES, save, set_title

SIDE = 1.1
"""Room beside the first and the last ratio, as a factor."""


def heat_map(path: Path, task: str, scores: Mapping[int, Sequence[tuple[float, float]]]) -> None:
    """Score of a task by length (columns) and depth (rows, the beginning of the text above).

    Args:
        path: of the PNG.
        task: its name.
        scores: length -> (depth, mean score) at the same depths for all lengths.
    """
    lengths = sorted(scores)
    depths = [depth for depth, _ in scores[lengths[0]]]
    rows = [[scores[length][place][1] for length in lengths] for place in range(len(depths))]
    mean = sum(map(sum, rows)) / (len(depths) * len(lengths))
    size = (WIDTH_INCHES, max(3.6, 1.8 + 0.13 * len(depths)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    set_title(figure, f"{task}: {mean:.0%} of what was asked for is in the answers")
    image = axes.imshow(rows, cmap="viridis", norm=Normalize(0, 1), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths])
    shown = range(0, len(depths), max(1, len(depths) // 10))
    axes.set_yticks(shown, labels=[f"{depths[place]:.0%}" for place in shown])
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_ylabel("depth in the text")
    figure.colorbar(image, ax=axes, label="score")
    save(figure, path)


def quality_figure(path: Path, title: str, panels: Mapping[str, Mapping[str, Sequence[Point]]]) -> None:
    """Quality over compression ratio, one panel below another for each measure, one line for each method.

    Args:
        path: of the PNG.
        title: what was read.
        panels: name of the measure -> name of the line -> its points by ratio.
    """
    size = (WIDTH_INCHES, 1.2 + 2.6 * len(panels))
    figure, grid = plt.subplots(len(panels), 1, sharex=True, squeeze=False, figsize=size, layout="constrained")
    set_title(figure, f"{title}: what is left at which compression ratio (bars: 95% intervals)")
    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    colors = {name: f"C{place % 10}" for place, name in enumerate(names)}
    for axes, (measure, panel) in zip(grid.flat, panels.items(), strict=True):
        for name, points in panel.items():
            ratios, values, intervals = zip(*((one.ratio, one.value, one.half_interval) for one in points), strict=True)
            axes.errorbar(ratios, values, intervals, label=name, color=colors[name], marker="o", capsize=3)
        axes.set_ylabel(measure)
    lowest = grid[-1][0]
    highest = max(one.ratio for panel in panels.values() for points in panel.values() for one in points)
    doublings = [2**power for power in range(math.ceil(math.log2(max(highest, 2.0))) + 1)]
    lowest.set_xscale("log", base=2)
    lowest.set_xticks(doublings, labels=map(str, doublings))
    lowest.set_xlim(doublings[0] / SIDE, doublings[-1] * SIDE)
    lowest.set_xlabel("compression ratio\n[uncompressed entries per entry held]")
    handles = {
        name: handle for axes in grid.flat for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)

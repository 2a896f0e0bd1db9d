"""Pictures of evaluations: scores of long-context tasks, and quality over compression ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.colors import Normalize

from megatron_dmc.report.figures import WIDTH_INCHES, save, set_title


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
    size = (WIDTH_INCHES, max(3.2, 1.8 + 0.13 * len(depths)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    set_title(figure, f"{task}: {mean:.0%} of what was asked for is in the answers")
    image = axes.imshow(rows, cmap="viridis", norm=Normalize(0, 1), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(lengths)), labels=[f"{length:,}" for length in lengths])
    shown = range(0, len(depths), max(1, len(depths) // 10))
    axes.set_yticks(shown, labels=[f"{depths[place]:.0%}" for place in shown])
    axes.set_xlabel("tokens of prompt and answer")
    axes.set_ylabel("depth in the text\n[share of it before what is to be found]")
    figure.colorbar(image, ax=axes, label="score")
    save(figure, path)

"""What every KV head decided while a stage trained, read from the files of its ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.runs.layout import DECISIONS_FOLDER


@dataclass(frozen=True)
class StageDecisions:
    """Share of tokens that each head merged into its newest entry.

    Attributes:
        steps: that every rank has logged.
        shares: per step, layer and KV head.
    """

    steps: list[int]
    shares: list[list[list[float]]]


def line(step: int, shares: dict[int, tuple[int, list[float]]]) -> dict[str, Any]:
    """One step of one rank: for each layer number its first KV head, and the shares from that head on."""
    layers = {str(layer): {"first_head": first, "merged": merged} for layer, (first, merged) in sorted(shares.items())}
    return {"step": step, "layers": layers}


def read_decisions(stage: Path) -> StageDecisions | None:
    """The decisions of a stage, put together from its ranks; None where they were not logged.

    Raises:
        ValueError: a line that is not one of ours.
    """
    steps: dict[int, dict[tuple[int, int], float]] = {}
    paths = sorted((stage / DECISIONS_FOLDER).glob("rank_*.jsonl"))
    for path in paths:
        for step, found in _lines(path):
            steps.setdefault(step, {}).update(found)
    heads = max((len(found) for found in steps.values()), default=0)
    whole = {step: found for step, found in sorted(steps.items()) if len(found) == heads}
    if not whole:
        return None
    layers = sorted({layer for layer, _ in next(iter(whole.values()))})
    shares = [
        [[share for (of, _), share in sorted(found.items()) if of == layer] for layer in layers]
        for found in whole.values()
    ]
    return StageDecisions(list(whole), shares)


def _lines(path: Path) -> Iterator[tuple[int, dict[tuple[int, int], float]]]:
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not text.endswith("\n"):
            break  # the run is writing it right now
        try:
            values = json.loads(text)
            found = {
                (int(layer), heads["first_head"] + offset): float(share)
                for layer, heads in values["layers"].items()
                for offset, share in enumerate(heads["merged"])
            }
            yield int(values["step"]), found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} holds no decisions of a step: {error}") from error

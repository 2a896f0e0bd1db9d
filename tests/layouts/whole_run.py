"""One run of the whole model, put together from the records of its ranks, and what two runs differ in.

Legend: S sequence (all positions), G KV heads (all).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.layouts.probe import Record

REPLICA_TOLERANCE = 1e-6
"""Relative: ranks that hold the same parameter end with the same gradient, up to the order of their sums."""

NEGLIGIBLE_NORM = 1e-8


@dataclass
class WholeRun:
    """A run, independent of its layout.

    Attributes:
        steps: logged values of every step.
        validations: logged values of every validation.
        gradients: by parameter name, of the watched step; none of what is frozen.
        weights: by parameter name, as the last step used them.
        logits, noise: by (layer, sequence), [S, G], of the watched step.
    """

    steps: list[dict[str, float]]
    validations: list[dict[str, float]]
    gradients: dict[str, np.ndarray]
    weights: dict[str, np.ndarray]
    logits: dict[tuple[int, int], np.ndarray]
    noise: dict[tuple[int, int], np.ndarray]

    def curve(self, name: str) -> np.ndarray:
        """One logged value over all steps."""
        return np.array([step[name] for step in self.steps])

    def accumulated_fractions(self) -> np.ndarray:
        """Share of accumulating decisions of each sequence in the watched step, over all layers."""
        sequences = sorted({sequence for _, sequence in self.logits})
        decisions = {key: self.logits[key] + self.noise[key] > 0 for key in self.logits}
        layers = {layer for layer, _ in self.logits}
        return np.array([np.mean([decisions[layer, sequence] for layer in layers]) for sequence in sequences])


def assemble(records: list[Record], vocab_size: int) -> WholeRun:
    """Put the records of all ranks together; replicas must agree."""
    logged = next(record for record in records if record.steps)
    splits = {name: split for record in records for name, split in record.split_dimension.items()}
    gradients, weights = (
        {
            name: _assemble_tensor(name, splits[name], parts, vocab_size)
            for name in sorted(splits)
            if (parts := _parts(name, kind, records))
        }
        for kind in ("gradients", "weights")
    )
    logits, noise = _assemble_decisions(records)
    return WholeRun(logged.steps, logged.validations, gradients, weights, logits, noise)


def _parts(name: str, kind: str, records: list[Record]) -> list[np.ndarray]:
    """What each tensor-parallel rank holds of a tensor; ranks that hold the same must agree."""
    parts: dict[int, np.ndarray] = {}
    for record in records:
        mine = getattr(record, kind).get(name)
        if mine is None:
            continue
        rank = record.tensor_rank if record.split_dimension[name] is not None else 0
        assert deviation(mine, parts.setdefault(rank, mine)) <= REPLICA_TOLERANCE, f"{kind} of {name}: replicas differ"
    return [parts[rank] for rank in sorted(parts)]


def _assemble_tensor(name: str, split: int | None, parts: list[np.ndarray], vocab_size: int) -> np.ndarray:
    if split is None:
        return parts[0]
    if name.endswith("linear_fc1.weight"):
        # Each rank holds its gate rows, then its up rows.
        halves = [np.split(part, 2) for part in parts]
        return np.concatenate([half[side] for side in (0, 1) for half in halves])
    whole = np.concatenate(parts, axis=split)
    return whole[:vocab_size] if name.startswith(("embedding.", "output_layer.")) else whole


def _assemble_decisions(records: list[Record]) -> tuple[dict, dict]:
    decisions = [part for record in records for part in record.decisions]
    if not decisions:
        return {}, {}
    shape = (1 + max(part.position_S.max() for part in decisions), 1 + max(part.head_G.max() for part in decisions))
    logits: dict[tuple[int, int], np.ndarray] = {}
    noise: dict[tuple[int, int], np.ndarray] = {}
    for part in decisions:
        place = np.ix_(part.position_S, part.head_G)
        for row, sequence in enumerate(part.sequence_B):
            key = (part.layer, int(sequence))
            for whole, mine in ((logits, part.logits_SBG), (noise, part.noise_SBG)):
                whole.setdefault(key, np.full(shape, np.nan))[place] = mine[:, row]
    assert not any(np.isnan(array).any() for array in [*logits.values(), *noise.values()])
    return logits, noise


def deviation(found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference over that of ``expected``; 0 where that norm is negligible."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(found - expected)) / norm if norm > NEGLIGIBLE_NORM else 0.0

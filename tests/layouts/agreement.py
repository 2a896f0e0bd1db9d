"""How closely a run in a parallel layout must agree with the same run on one rank, and how closely it does.

The tolerances are within ten times what rounding alone does to Megatron's own model (``test_layout_control``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.layouts.whole_run import WholeRun, deviation

LOSS = 4e-6
"""Absolute, LM loss and compression loss of the watched step. Megatron's own model and DMC show 4.8e-7."""

GRADIENT = 1e-5
"""Relative (Frobenius), every parameter in the watched step. Megatron's own model shows 1.8e-6, DMC at most 5.8e-6."""

CURVE = 4e-6
"""Absolute, both losses in every step of 20 at learning rate 3e-5. Megatron's own model and DMC show 9.5e-7."""

UNDECIDED = 1e-3
"""Decision logits closer to zero than this may fall on either side."""

LOSSES = ("lm loss", "distillation loss", "compression loss")


@dataclass(frozen=True)
class Agreement:
    """Largest differences between two runs.

    Attributes:
        loss, curve: absolute, of the first step and of all steps.
        gradient: relative, of the parameter that differs most.
        decisions: decisions that differ, undecided ones left out.
    """

    loss: float
    curve: float
    gradient: float
    decisions: int


def compare(found: WholeRun, expected: WholeRun) -> Agreement:
    """The differences of a run from the one it must equal; both hold the same parameters, sequences and noise."""
    assert found.gradients.keys() == expected.gradients.keys()
    assert found.logits.keys() == expected.logits.keys()
    assert len(found.steps) == len(expected.steps)
    for key, noise in expected.noise.items():
        np.testing.assert_array_equal(found.noise[key], noise, err_msg=f"noise of layer, sequence {key}")
    names = [name for name in LOSSES if name in expected.steps[0]]
    curves = np.stack([np.abs(found.curve(name) - expected.curve(name)) for name in names])
    gradients = [deviation(found.gradients[name], expected.gradients[name]) for name in expected.gradients]
    decisions = sum(_different_decisions(found, expected, key) for key in expected.logits)
    return Agreement(float(curves[:, 0].max()), float(curves.max()), max(gradients), decisions)


def assert_telling(run: WholeRun, target_cr: float) -> None:
    """Fail where a comparison with this run would show little: one decision everywhere, or every hinge alike."""
    logits = np.stack(list(run.logits.values()))
    assert 0.2 < (logits > 0).mean() < 0.8
    fractions = run.accumulated_fractions()
    half_a_decision = 0.5 * len(fractions) / logits.size
    target = 1 - 1 / target_cr
    assert (fractions < target - half_a_decision).sum() >= 2, fractions
    assert (fractions > target + half_a_decision).sum() >= 2, fractions


def _different_decisions(found: WholeRun, expected: WholeRun, key: tuple[int, int]) -> int:
    theirs, ours = (run.logits[key] + run.noise[key] for run in (found, expected))
    return int((((theirs > 0) != (ours > 0)) & (np.abs(ours) > UNDECIDED)).sum())


def assert_agree(found: WholeRun, expected: WholeRun) -> Agreement:
    """Fail where the runs differ by more than the tolerances; print and return by how much they do."""
    agreement = compare(found, expected)
    print(agreement)
    assert agreement.loss <= LOSS, agreement
    assert agreement.gradient <= GRADIENT, agreement
    assert agreement.decisions == 0, agreement
    assert agreement.curve <= CURVE, agreement
    return agreement

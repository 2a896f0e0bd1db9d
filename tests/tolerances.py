"""How closely two computations must agree, and why: the one table of the tests of operations.

``OUTPUT`` is the largest absolute difference of outputs of order 1, ``GRADIENT`` the Frobenius norm of the
difference over that of the reference, which always runs in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN_OUTPUT = 1e-5
"""Absolute, float32: what ``golden/README.md`` names. The authors' sums run in another order."""

GOLDEN_GRADIENT = 1e-4
"""Relative (Frobenius), float32: what ``golden/README.md`` names."""

OUTPUT = {
    torch.float64: 1e-12,  # only the order of sums differs
    torch.float32: 5e-6,  # 2**-24 times sums of some hundred terms of order 1
    torch.bfloat16: 4e-2,  # inputs, weights and output are rounded to 8 bits: 2**-8 each at values up to 4
}

GRADIENT = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,  # gradients of decisions are differences of much larger terms
    torch.bfloat16: 4e-2,  # ten roundings to 8 bits between loss and input
}

GRADIENT_FLOOR = 1.0
"""Reference norms below this count as this: the gradients are of order 1, and one that is exactly zero (the importance
of tokens that never merge) has no relative error."""


def output_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; infinite where ``found`` is not a number."""
    difference = (found.detach().double() - expected.detach().double()).abs()
    return difference.nan_to_num(nan=float("inf")).max().item() if difference.numel() else 0.0


def gradient_error(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Frobenius norm of the difference over that of ``expected``, or over ``floor`` if that is larger."""
    found, expected = found.detach().double(), expected.detach().double()
    norm = max(expected.norm().item(), floor)
    difference = (found - expected).norm().nan_to_num(nan=float("inf")).item()
    return difference / norm if norm else difference

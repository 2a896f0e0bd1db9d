"""Means with their standard errors, and perplexity.

Legend: N sequences, questions, or whatever is independent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor


class Estimate(NamedTuple):
    """A mean over independent values."""

    mean: float
    standard_error: float
    """0 for a single value."""

    @classmethod
    def of(cls, value_N: Tensor) -> Estimate:
        """From the values."""
        count = len(value_N)
        error = value_N.double().std().item() / math.sqrt(count) if count > 1 else 0.0
        return cls(value_N.double().mean().item(), error)


def perplexity_of(loss: float) -> float:
    """exp(loss), without an overflow."""
    return math.exp(loss) if not loss >= 700 else math.inf

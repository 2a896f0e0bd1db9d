"""What the decisions of DMC amount to as numbers.

Shapes: S sequence, B batch, G KV heads.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weights(NamedTuple):
    """Decisions as numbers, float32 [S, B, G]."""

    alpha: Tensor
    """Decisions within [0, 1]; 0 at the first position of the sequence and of every document."""
    omega: Tensor
    """Positive importances."""
    key_bias: Tensor
    """log(1 - alpha) of the position after, which overwrites the key; 0 for the last key of a document."""

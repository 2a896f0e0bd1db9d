"""A bias per key inside plain attention: one channel of queries and keys that nothing else uses carries it.

The query channel is a constant c, a power of two near sqrt(D), the key channel bias / (c * scale), so that the score
receives exactly the bias. c is exact in every dtype; in bfloat16 the bias is rounded to 8 bits like every other
factor of a score, a relative error of the weight below |bias| / 512, which matters only where the weight is small.

Shapes: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import math

from torch import Tensor

from megatron_dmc.ops.precision import NEGLIGIBLE_WEIGHT

HIDDEN = -1.0e4
"""Bias of a key that is not to be seen: its weight is 0 in every dtype, and float16 still holds it."""

NEGLIGIBLE = -40.0
"""A bias below it becomes HIDDEN: exp(-40) is below the rounding of float64, and weights near exp(-90) would be
denormal numbers, with which a CPU computes up to eight times slower."""


def fold(q_BNTD: Tensor, k_BGSD: Tensor, bias_SBG: Tensor, scale: float) -> None:
    """Write the bias into the last channel of ``q`` and ``k``, in place; a negligible weight becomes exactly 0."""
    constant = _query_constant(scale)
    q_BNTD[..., -1] = constant
    bias_BGS = bias_SBG.permute(1, 2, 0)
    bias_BGS = bias_BGS.masked_fill(bias_BGS < NEGLIGIBLE, HIDDEN).masked_fill(bias_BGS.abs() < NEGLIGIBLE_WEIGHT, 0.0)
    k_BGSD[..., -1] = bias_BGS / (constant * scale)


def unfold_gradient(grad_q_BNTD: Tensor, grad_k_BGSD: Tensor, scale: float) -> Tensor:
    """Take the gradient of the bias [S, B, G] out of the last channels, which are left 0."""
    grad_bias = grad_k_BGSD[..., -1].permute(2, 0, 1) / (_query_constant(scale) * scale)
    grad_q_BNTD[..., -1] = 0.0
    grad_k_BGSD[..., -1] = 0.0
    return grad_bias


def _query_constant(scale: float) -> float:
    return 2.0 ** round(math.log2(1.0 / scale))

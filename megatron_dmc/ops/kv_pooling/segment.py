"""Exact pooling: the mean over the whole segment (window 0) in the convex gate form.

With g_t = omega_t / z_t the mean moves towards each token: y_t = (1 - g_t) y_{t-1} + g_t k_t. Only sums of positive
terms and convex combinations occur, in the backward too, so nothing cancels and no logarithm is needed.

Shapes: S sequence, B batch, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling.dispatch import scans
from megatron_dmc.ops.kv_pooling.scan import shift
from megatron_dmc.ops.precision import without_negligible


class Gates(NamedTuple):
    """z_t, the weight of a segment so far; g_t = omega_t / z_t; and 1 - g_t = alpha_t z_{t-1} / z_t."""

    z_SBG: Tensor
    gate_SBG: Tensor
    decay_SBG: Tensor


def gates(alpha_SBG: Tensor, omega_SBG: Tensor) -> Gates:
    """The convex weights of the recurrence, float32 [S, B, G]."""
    alpha_SBG = without_negligible(alpha_SBG)
    z_SBG = scans(omega_SBG).gated_scan(alpha_SBG, None, omega_SBG[..., None])[..., 0]
    return Gates(z_SBG, omega_SBG / z_SBG, alpha_SBG * shift(z_SBG, 1) / z_SBG)


def pool(xs_SBGD: tuple[Tensor, ...], alpha_SBG: Tensor, omega_SBG: Tensor) -> tuple[Tensor, ...]:
    """Segment means of each of ``xs_SBGD``, float32."""
    _, gate, decay = gates(alpha_SBG, omega_SBG)
    return tuple(scans(x).gated_scan(decay, gate, x) for x in xs_SBGD)


def pool_backward(
    xs_SBGD: tuple[Tensor, ...],
    means_SBGD: tuple[Tensor, ...],
    grads_SBGD: tuple[Tensor, ...],
    alpha_SBG: Tensor,
    omega_SBG: Tensor,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of each of ``xs_SBGD``, of alpha and of omega, from the means and their gradients."""
    z, gate, decay = gates(alpha_SBG, omega_SBG)
    grad_xs, grad_gate = [], torch.zeros_like(gate)
    for x, mean, grad in zip(xs_SBGD, means_SBGD, grads_SBGD, strict=True):
        grad_x, along_gate, _ = scans(x).gated_scan_backward(decay, gate, x, mean, grad)
        grad_xs.append(grad_x)
        grad_gate = grad_gate + along_gate
    # d/dz_t arrives through g_t = omega_t / z_t and through z_{t+1} = alpha_{t+1} z_t + omega_{t+1}.
    through_gate = -grad_gate * gate / z
    grad_z = scans(z).gated_scan(shift(alpha_SBG, -1), None, through_gate[..., None], reverse=True)[..., 0]
    from_later = shift(alpha_SBG, -1) * shift(grad_z, -1)
    return tuple(grad_xs), shift(z, 1) * grad_z, grad_gate * decay / z + from_later

"""Queries and keys as attention reads them: turned by RoPE, their borrowed channels faded. Differentiable.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.borrowed import EVERY_HEAD, Borrowed
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import Rotation, rotate


def rotated_queries(
    q_TBND: Tensor, num_kv_heads: int, geometry: Geometry, neuron_scale: float, borrowed: Borrowed = EVERY_HEAD
) -> Tensor:
    """Queries at their positions.

    Args:
        q_TBND: before RoPE.
        num_kv_heads: G.
        geometry: positions.
        neuron_scale: factor of the borrowed channels before and after RoPE; 0 takes them out, 1 leaves them alone.
        borrowed: the heads that lend a channel.
    """
    if borrowed.queries is None or neuron_scale == 1:
        return _rotated(q_TBND, geometry.rotations(neuron_scale, q_TBND.dtype)[0])
    fade_ND = torch.ones(q_TBND.shape[-2:], dtype=q_TBND.dtype, device=q_TBND.device)
    fade_ND.unflatten(0, (num_kv_heads, -1))[:, : borrowed.queries, -1] = neuron_scale
    return _rotated(q_TBND * fade_ND, geometry.rotations(1.0, q_TBND.dtype)[0]) * fade_ND


def rotated_keys(k_SBGD: Tensor, geometry: Geometry, neuron_scale: float, borrowed: Borrowed = EVERY_HEAD) -> Tensor:
    """Keys at their positions; arguments as in :func:`rotated_queries`."""
    return _rotated(k_SBGD, geometry.rotations(neuron_scale if borrowed.keys else 1.0, k_SBGD.dtype)[1])


def _rotated(x: Tensor, rotation: Rotation) -> Tensor:
    if not torch.is_grad_enabled():
        return rotate(x, rotation, x.dtype)
    rotated: Tensor = _Rotate.apply(x, rotation)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        return rotate(x, rotation, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rotate(grad, ctx.rotation, grad.dtype, inverse=True), None

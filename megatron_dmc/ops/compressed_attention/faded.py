"""Causal attention with RoPE while the borrowed channel fades: what the stage before compression computes.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import masked_attention
from megatron_dmc.ops.rope import Rotation, rotate


def faded_attention(q_TBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, neuron_scale: float, geometry: Geometry) -> Tensor:
    """Attention output [T, B, N, D] from projections before RoPE.

    The last channel of queries and keys is multiplied by ``neuron_scale`` before and after RoPE; 1 is the attention
    of Llama, 0 that of DMC where it never accumulates.

    Raises:
        ValueError: see :func:`megatron_dmc.ops.masked_attention.masked_attention`.
    """
    q_rotation, k_rotation = geometry.rotations(neuron_scale, q_TBND.dtype)
    q_TBND, k_SBGD = _Rotate.apply(q_TBND, q_rotation), _Rotate.apply(k_SBGD, k_rotation)
    return masked_attention(q_TBND, k_SBGD, v_SBGD, None, geometry, free_window=None)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        return rotate(x, rotation, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rotate(grad, ctx.rotation, grad.dtype, inverse=True), None

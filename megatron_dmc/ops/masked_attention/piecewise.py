"""Masked attention as one step of autograd: the visible pairs in pieces, each through a stock kernel.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention.bias import fold, unfold_gradient
from megatron_dmc.ops.masked_attention.merged import Operands, Plan, attend, attend_backward
from megatron_dmc.ops.masked_attention.pieces import cut

SPARE_CHANNELS = 8
"""Channels added to hold the bias where the head has none to spare: kernels on a GPU take head dims in eights."""


def masked_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    key_bias_SBG: Tensor | None,
    geometry: Geometry,
    *,
    free_window: int | None = 0,
) -> Tensor:
    """softmax_j(q_i k_j / sqrt(D) + bias_j [i - j > free_window]) v_j over j <= i of the same document.

    Args:
        q_TBND: rotated queries: the whole sequence, or chunks of it.
        k_SBGD: rotated keys of the whole sequence; N is a multiple of G.
        v_SBGD: values.
        key_bias_SBG: finite bias of each key; ``HIDDEN`` or below hides it. Not read where ``free_window`` is None.
        geometry: positions of queries and keys.
        free_window: keys at most that many positions back carry no bias; None: no key does.

    Returns:
        Attention output [T, B, N, D]. Gradients flow to queries, keys, values and bias.

    Raises:
        ValueError: shapes that do not fit together or to the geometry.
    """
    check_shapes(q_TBND, k_SBGD, v_SBGD, geometry)
    if free_window is None:
        key_bias_SBG = None
    elif key_bias_SBG is None or key_bias_SBG.shape != k_SBGD.shape[:-1]:
        given = None if key_bias_SBG is None else tuple(key_bias_SBG.shape)
        raise ValueError(f"key bias {given}: must be [S, B, G] = {tuple(k_SBGD.shape[:-1])} like the keys")
    plan = plan_attention(geometry, free_window, q_TBND.shape[-1])
    return _MaskedAttention.apply(q_TBND, k_SBGD, v_SBGD, key_bias_SBG, plan)


def attend_masked(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    key_bias_SBG: Tensor | None,
    geometry: Geometry,
    *,
    free_window: int | None = 0,
) -> tuple[Tensor, Tensor]:
    """:func:`masked_attention` outside autograd: output [T, B, N, D], and log-sum-exp of the scores [B, N, T]."""
    near = _heads_first(q_TBND, k_SBGD, v_SBGD)
    plan = plan_attention(geometry, free_window, q_TBND.shape[-1])
    out, lse = attend(plan, near, _padded(near, key_bias_SBG, plan.scale))
    return out.permute(2, 0, 1, 3), lse


def plan_attention(geometry: Geometry, free_window: int | None, head_dim: int) -> Plan:
    """The pieces of a geometry, cut once. Raises ``ValueError`` on a negative window."""
    if free_window is not None and free_window < 0:
        raise ValueError(f"free_window={free_window}: must be >= 0, or None for no bias at all")
    return geometry.once(("plan", free_window, head_dim), lambda: _plan(geometry, free_window, head_dim))


def _plan(geometry: Geometry, free_window: int | None, head_dim: int) -> Plan:
    documents = [[0]] * geometry.batch if geometry.documents is None else geometry.documents
    starts = geometry.chunk_starts
    pieces = cut(geometry.length, geometry.chunk_length, starts, documents, free_window)
    return Plan(pieces, free_window == 0, starts, head_dim**-0.5)


def check_shapes(q_TBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, geometry: Geometry) -> None:
    """Raise ``ValueError`` unless queries, keys and values fit together and to the geometry."""
    num_queries, batch, num_heads, head_dim = q_TBND.shape
    if (k_SBGD.shape[1], k_SBGD.shape[3]) != (batch, head_dim) or num_heads % k_SBGD.shape[2]:
        raise ValueError(
            f"queries {tuple(q_TBND.shape)} and keys {tuple(k_SBGD.shape)}: batch and head dim must agree, "
            "and the query heads must be a multiple of the KV heads"
        )
    if v_SBGD.shape != k_SBGD.shape:
        raise ValueError(f"values {tuple(v_SBGD.shape)}: must have the shape of the keys, {tuple(k_SBGD.shape)}")
    given, expected = (num_queries, len(k_SBGD), batch), (geometry.query_count, geometry.length, geometry.batch)
    if given != expected:
        raise ValueError(f"{given} queries, keys and rows: the geometry was made for {expected}")


class _MaskedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Plan) -> Tensor:
        near = _heads_first(q, k, v)
        out, lse = attend(plan, near, _padded(near, bias, plan.scale))
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, bias, out, lse)
        return out.permute(2, 0, 1, 3)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        near = _heads_first(q, k, v)
        far = _padded(near, bias, ctx.plan.scale)
        near_grads, far_grads = attend_backward(ctx.plan, near, far, (out, lse), grad_out.permute(1, 2, 0, 3))
        grad_bias = None if bias is None else torch.zeros_like(bias)
        if far_grads:
            grad_bias = unfold_gradient(far_grads[0], far_grads[1], ctx.plan.scale).to(bias.dtype)
            far_grads = [x[..., : q.shape[-1]] for x in far_grads]
        grads = [sum(parts) for parts in zip(*(g for g in (near_grads, far_grads) if g), strict=True)]
        return *(g.permute(2, 0, 1, 3) for g in grads), grad_bias, None


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def _padded(near: Operands, bias: Tensor | None, scale: float) -> Operands | None:
    """Copies with spare channels, the last of which carry the bias."""
    if bias is None:
        return None
    q, k, v = (F.pad(x, (0, SPARE_CHANNELS)) for x in near)
    fold(q, k, bias, scale)
    return q, k, v

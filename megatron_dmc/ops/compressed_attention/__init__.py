"""The whole operation of DMC in training: pooling, RoPE and masked attention as one step of autograd.

Only the inputs, the output and the log-sum-exp are kept for the backward pass; pooled keys and values and rotated
queries are computed again there, which costs little beside attention.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling import pool_backward, pool_forward
from megatron_dmc.ops.masked_attention import masked_attention
from megatron_dmc.ops.masked_attention.bias import fold, unfold_gradient
from megatron_dmc.ops.masked_attention.merged import Operands, Plan, attend, attend_backward
from megatron_dmc.ops.masked_attention.pieces import query_positions
from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.rope import Rotation, faded_rotation, rotate
from megatron_dmc.ops.torch_function import without_modes

CosSin = tuple[Tensor, Tensor]
"""Cosine and sine of the rotary angles of all positions, each [S, D/2]."""


class Weights(NamedTuple):
    """Decisions as numbers, float32 [S, B, G]."""

    alpha: Tensor
    """Decisions within [0, 1]; 0 at the first position of the sequence and of every document."""
    omega: Tensor
    """Positive importances."""
    key_bias: Tensor
    """log(1 - alpha) of the position after, which overwrites the key; 0 for the last key of a document."""


class _Settings(NamedTuple):
    cos_sin_S: CosSin
    window_size: int
    plan: Plan


def compressed_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    weights_SBG: Weights,
    *,
    cos_sin_S: CosSin,
    window_size: int,
    plan: Plan,
) -> Tensor:
    """Attention of each query over the cache as it was at its position; [T, B, N, D].

    Args:
        q_TBND: queries before RoPE; the last channel is not used.
        k_SBGD: keys before RoPE; the last channel is not used.
        v_SBGD: values.
        weights_SBG: what the decisions amount to.
        cos_sin_S: of all positions of the sequence.
        window_size: tokens in the mean of a segment; 0 = the whole segment.
        plan: visible pairs, of :func:`megatron_dmc.ops.masked_attention.plan_attention` with ``free_window=0``.
    """
    return _CompressedAttention.apply(q_TBND, k_SBGD, v_SBGD, *weights_SBG, _Settings(cos_sin_S, window_size, plan))


def faded_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    neuron_scale: float,
    *,
    cos_sin_S: CosSin,
    query_starts: Sequence[int] | None = None,
    documents: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Causal attention with RoPE while the last channel of queries and keys fades: the stage ``zero_out``.

    The channel is multiplied by ``neuron_scale`` before and after RoPE; 1 is the attention of Llama. Other arguments
    and the result as in :func:`compressed_attention`.
    """
    q_rotation, k_rotation = _rotations(cos_sin_S, neuron_scale, q_TBND, query_starts)
    q_TBND, k_SBGD = _Rotate.apply(q_TBND, q_rotation), _Rotate.apply(k_SBGD, k_rotation)
    return masked_attention(
        q_TBND, k_SBGD, v_SBGD, None, free_window=None, query_starts=query_starts, documents=documents
    )


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rotation: Rotation) -> Tensor:
        ctx.rotation = rotation
        return rotate(x, rotation, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rotate(grad, ctx.rotation, grad.dtype, inverse=True), None


class _CompressedAttention(torch.autograd.Function):
    @staticmethod
    @without_modes
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alpha: Tensor,
        omega: Tensor,
        bias: Tensor,
        settings: _Settings,
    ) -> Tensor:
        ctx.settings = settings
        far, _ = _operands(q, k, v, Weights(alpha, omega, bias), settings)
        out, lse = attend(settings.plan, _near(far), far)
        ctx.save_for_backward(q, k, v, alpha, omega, bias, out, lse)
        return out.permute(2, 0, 1, 3)

    @staticmethod
    @without_modes
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alpha, omega, bias, out, lse = ctx.saved_tensors
        cos_sin, window_size, plan = ctx.settings
        far, means = _operands(q, k, v, Weights(alpha, omega, bias), ctx.settings)
        _, grads = attend_backward(plan, _near(far), far, (out, lse), grad_out.permute(1, 2, 0, 3))
        del far
        grad_bias = unfold_gradient(grads[0], grads[1], plan.scale)
        grad_q, grad_k, grad_v = (x.permute(2, 0, 1, 3) for x in grads)
        q_rotation, k_rotation = _rotations(cos_sin, 0.0, q, plan.query_starts)
        grad_q = rotate(grad_q, q_rotation, q.dtype, inverse=True)
        grad_k = rotate(grad_k, k_rotation, accumulation_dtype(k.dtype), inverse=True)
        weights = (alpha.to(grad_k.dtype), omega.to(grad_k.dtype))
        (grad_k, grad_v), grad_alpha, grad_omega = pool_backward((k, v), means, (grad_k, grad_v), *weights, window_size)
        found = (grad_q, grad_k, grad_v, grad_alpha, grad_omega, grad_bias)
        inputs = (q, k, v, alpha, omega, bias)
        return *(g.to(x.dtype) for g, x in zip(found, inputs, strict=True)), None


def _rotations(
    cos_sin: CosSin, neuron_scale: float, q: Tensor, query_starts: Sequence[int] | None
) -> tuple[Rotation, Rotation]:
    """Rotations of the queries and of the keys, in the accumulation dtype."""
    cos, sin = (x.to(accumulation_dtype(q.dtype)) for x in cos_sin)
    k_rotation = faded_rotation(cos, sin, neuron_scale)
    if query_starts is None or (list(query_starts) == [0] and q.shape[0] == cos.shape[0]):
        return k_rotation, k_rotation
    positions = query_positions(q.shape[0], query_starts).to(cos.device)
    return faded_rotation(cos[positions], sin[positions], neuron_scale), k_rotation


def _operands(
    q: Tensor, k: Tensor, v: Tensor, weights: Weights, settings: _Settings
) -> tuple[Operands, tuple[Tensor, ...]]:
    """Rotated queries, pooled and rotated keys with the bias folded in, pooled values; and the means in float32."""
    cos_sin, window_size, plan = settings
    dtype = accumulation_dtype(k.dtype)
    means = pool_forward((k, v), weights.alpha.to(dtype), weights.omega.to(dtype), window_size)
    q_rotation, k_rotation = _rotations(cos_sin, 0.0, q, plan.query_starts)
    q = rotate(q, q_rotation, q.dtype).permute(1, 2, 0, 3)
    k = rotate(means[0], k_rotation, k.dtype).permute(1, 2, 0, 3)
    fold(q, k, weights.key_bias, plan.scale)
    return (q, k, means[1].to(v.dtype).permute(1, 2, 0, 3)), means


def _near(far: Sequence[Tensor]) -> Operands:
    """The operands of the own positions: all channels but the one with the bias."""
    q, k, v = far
    return q[..., :-1], k[..., :-1], v

"""The whole operation of DMC in training as one step of autograd.

Only the inputs, the output and the log-sum-exp are kept for the backward pass; pooled keys and values and rotated
queries are computed again there, which costs little beside attention. The two halves of its forward pass serve
inference too: :func:`pool_and_rotate` makes the entry of every position, :func:`attend_pooled` reads them.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.compressed_attention.weights import Weights
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.kv_pooling import pool_backward, pool_forward
from megatron_dmc.ops.masked_attention.bias import fold, unfold_gradient
from megatron_dmc.ops.masked_attention.merged import Operands, attend, attend_backward
from megatron_dmc.ops.masked_attention.piecewise import check_shapes, plan_attention
from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.rope import rotate
from megatron_dmc.ops.torch_function import without_modes


def compressed_attention(
    q_TBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, weights_SBG: Weights, geometry: Geometry, *, window_size: int
) -> Tensor:
    """Attention of each query over the cache as it was at its position; [T, B, N, D].

    Args:
        q_TBND: queries before RoPE; the last channel is not used.
        k_SBGD: keys before RoPE; the last channel is not used.
        v_SBGD: values.
        weights_SBG: what the decisions amount to.
        geometry: positions of queries and keys.
        window_size: tokens in the mean of a segment; 0 = the whole segment.

    Raises:
        ValueError: shapes that do not fit together or to the geometry.
    """
    check_shapes(q_TBND, k_SBGD, v_SBGD, geometry)
    return _CompressedAttention.apply(q_TBND, k_SBGD, v_SBGD, *weights_SBG, _Settings(geometry, window_size))


def pool_and_rotate(
    k_SBGD: Tensor, v_SBGD: Tensor, alpha_SBG: Tensor, omega_SBG: Tensor, geometry: Geometry, window_size: int
) -> tuple[Tensor, Tensor]:
    """The entry that each position makes, as its cache holds it: rotated mean key, mean value; dtypes of the inputs.

    Outside autograd; arguments as in :func:`compressed_attention`.
    """
    means = _means((k_SBGD, v_SBGD), alpha_SBG, omega_SBG, window_size)
    _, k_rotation = geometry.rotations(0.0, k_SBGD.dtype)
    return rotate(means[0], k_rotation, k_SBGD.dtype), means[1].to(v_SBGD.dtype)


def attend_pooled(
    q_TBND: Tensor, entry_k_SBGD: Tensor, entry_v_SBGD: Tensor, key_bias_SBG: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor]:
    """Attention over the entries of :func:`pool_and_rotate`, outside autograd.

    Args:
        q_TBND: queries before RoPE.
        entry_k_SBGD, entry_v_SBGD: entries.
        key_bias_SBG: see :class:`Weights`.
        geometry: positions of queries and keys.

    Returns:
        Output [T, B, N, D] and log-sum-exp [B, N, T].
    """
    far = _folded(q_TBND, entry_k_SBGD.clone(), entry_v_SBGD, key_bias_SBG, geometry)
    out, lse = attend(plan_attention(geometry, 0, q_TBND.shape[-1]), _near(far), far)
    return out.permute(2, 0, 1, 3), lse


class _Settings(NamedTuple):
    geometry: Geometry
    window_size: int


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
        geometry, window_size = ctx.settings = settings
        ctx.plan = plan_attention(geometry, 0, q.shape[-1])
        entry_k, entry_v = pool_and_rotate(k, v, alpha, omega, geometry, window_size)
        far = _folded(q, entry_k, entry_v, bias, geometry)
        out, lse = attend(ctx.plan, _near(far), far)
        ctx.save_for_backward(q, k, v, alpha, omega, bias, out, lse)
        return out.permute(2, 0, 1, 3)

    @staticmethod
    @without_modes
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, alpha, omega, bias, out, lse = ctx.saved_tensors
        geometry, window_size = ctx.settings
        q_rotation, k_rotation = geometry.rotations(0.0, q.dtype)
        means = _means((k, v), alpha, omega, window_size)
        far = _folded(q, rotate(means[0], k_rotation, k.dtype), means[1].to(v.dtype), bias, geometry)
        _, grads = attend_backward(ctx.plan, _near(far), far, (out, lse), grad_out.permute(1, 2, 0, 3))
        del far
        grad_bias = unfold_gradient(grads[0], grads[1], ctx.plan.scale)
        grad_q, grad_k, grad_v = (x.permute(2, 0, 1, 3) for x in grads)
        grad_q = rotate(grad_q, q_rotation, q.dtype, inverse=True)
        wide = accumulation_dtype(k.dtype)
        grad_k = rotate(grad_k, k_rotation, wide, inverse=True)
        (grad_k, grad_v), grad_alpha, grad_omega = pool_backward(
            (k, v), means, (grad_k, grad_v), alpha.to(wide), omega.to(wide), window_size
        )
        found = (grad_q, grad_k, grad_v, grad_alpha, grad_omega, grad_bias)
        inputs = (q, k, v, alpha, omega, bias)
        return *(g.to(x.dtype) for g, x in zip(found, inputs, strict=True)), None


def _means(xs_SBGD: tuple[Tensor, Tensor], alpha: Tensor, omega: Tensor, window_size: int) -> tuple[Tensor, ...]:
    """Weighted means of the segments so far, in the accumulation dtype."""
    wide = accumulation_dtype(xs_SBGD[0].dtype)
    return pool_forward(xs_SBGD, alpha.to(wide), omega.to(wide), window_size)


def _folded(q: Tensor, entry_k: Tensor, entry_v: Tensor, bias: Tensor, geometry: Geometry) -> Operands:
    """Rotated queries, and entries with the bias folded in (into ``entry_k`` itself), heads first."""
    q_rotation, _ = geometry.rotations(0.0, q.dtype)
    q = rotate(q, q_rotation, q.dtype).permute(1, 2, 0, 3)
    k = entry_k.permute(1, 2, 0, 3)
    fold(q, k, bias, q.shape[-1] ** -0.5)
    return q, k, entry_v.permute(1, 2, 0, 3)


def _near(far: Sequence[Tensor]) -> Operands:
    """The operands of the own positions: all channels but the one with the bias."""
    q, k, v = far
    return q[..., :-1], k[..., :-1], v

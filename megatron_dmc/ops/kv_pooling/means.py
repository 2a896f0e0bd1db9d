"""Running means of keys and values, whole segments or windows: checks, choice, and one step of autograd.

Shapes: S sequence, B batch, G KV heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling import segment, window
from megatron_dmc.ops.precision import accumulation_dtype


def pool_kv(
    k_SBGD: Tensor, v_SBGD: Tensor, alpha_SBG: Tensor, omega_SBG: Tensor, window_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Weighted means of the tokens of each segment so far ([DMC] arXiv 2403.09636, eq. 5 to 7).

    Args:
        k_SBGD: keys before RoPE, any floating dtype.
        v_SBGD: values.
        alpha_SBG: decisions within [0, 1]; 0 at the first position of the sequence and of every document.
        omega_SBG: positive importances.
        window_size: tokens in the mean, the current one counted; 0 = the whole segment.

    Returns:
        Pooled keys and values, in the dtypes of the inputs; sums are float32. Gradients flow to all four tensors.

    Raises:
        ValueError: shapes that do not belong together, or a negative window.
    """
    _check(k_SBGD, v_SBGD, alpha_SBG, omega_SBG, window_size)
    return _PoolKV.apply(k_SBGD, v_SBGD, alpha_SBG, omega_SBG, window_size)


def pool_forward(
    xs_SBGD: tuple[Tensor, ...], alpha_SBG: Tensor, omega_SBG: Tensor, window_size: int
) -> tuple[Tensor, ...]:
    """Means of each of ``xs_SBGD`` in float32, outside autograd."""
    if _whole_segment(xs_SBGD[0], window_size):
        return segment.pool(xs_SBGD, alpha_SBG, omega_SBG)
    return window.pool(xs_SBGD, alpha_SBG, omega_SBG, window_size)


def pool_backward(
    xs_SBGD: tuple[Tensor, ...],
    means_SBGD: tuple[Tensor, ...],
    grads_SBGD: tuple[Tensor, ...],
    alpha_SBG: Tensor,
    omega_SBG: Tensor,
    window_size: int,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Float32 gradients of each of ``xs_SBGD``, of alpha and of omega, from the means and their gradients."""
    if _whole_segment(xs_SBGD[0], window_size):
        return segment.pool_backward(xs_SBGD, means_SBGD, grads_SBGD, alpha_SBG, omega_SBG)
    return window.pool_backward(xs_SBGD, means_SBGD, grads_SBGD, alpha_SBG, omega_SBG, window_size)


def _whole_segment(x_SBGD: Tensor, window_size: int) -> bool:
    return window_size == 0 or window_size >= x_SBGD.shape[0]


class _PoolKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, alpha: Tensor, omega: Tensor, window_size: int) -> tuple[Tensor, ...]:
        dtype = accumulation_dtype(k.dtype)
        ctx.save_for_backward(k, v, alpha, omega)
        ctx.window_size = window_size
        pooled_k, pooled_v = pool_forward((k, v), alpha.to(dtype), omega.to(dtype), window_size)
        return pooled_k.to(k.dtype), pooled_v.to(v.dtype)

    @staticmethod
    def backward(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor | None, ...]:
        # The means are computed again in float32: cheaper than keeping them, and exact under bfloat16.
        k, v, alpha, omega = ctx.saved_tensors
        dtype = accumulation_dtype(k.dtype)
        weights = (alpha.to(dtype), omega.to(dtype))
        means = pool_forward((k, v), *weights, ctx.window_size)
        grad_xs, grad_alpha, grad_omega = pool_backward((k, v), means, (grad_k, grad_v), *weights, ctx.window_size)
        grads = (*grad_xs, grad_alpha, grad_omega)
        return *(g.to(x.dtype) for g, x in zip(grads, ctx.saved_tensors, strict=True)), None


def _check(k: Tensor, v: Tensor, alpha: Tensor, omega: Tensor, window_size: int) -> None:
    if k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"keys {tuple(k.shape)} and values {tuple(v.shape)}: give both as [S, B, G, D]")
    for name, weight in (("alpha", alpha), ("omega", omega)):
        if weight.shape != k.shape[:-1]:
            raise ValueError(f"{name} {tuple(weight.shape)}: must be [S, B, G] = {tuple(k.shape[:-1])} like the keys")
    if window_size < 0:
        raise ValueError(f"window_size={window_size}: must be >= 0 (0 = whole segment)")

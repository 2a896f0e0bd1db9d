"""Causal attention whose older keys carry a bias, in memory linear in the sequence length.

DMC hides a key from all queries but its own (``free_window=0``), DMS from those further than a window; without a
bias it is plain causal attention. ``reference`` holds all scores; the fast form cuts the visible pairs into
``pieces`` for stock kernels (``flash``, with ``blockwise`` where there is none), puts the ``bias`` into a spare
channel and ``merged`` puts the pieces together.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.masked_attention.bias import HIDDEN, fold, unfold_gradient
from megatron_dmc.ops.masked_attention.merged import Operands, Plan, attend, attend_backward
from megatron_dmc.ops.masked_attention.pieces import cut

__all__ = ["HIDDEN", "masked_attention", "plan_attention"]

SPARE_CHANNELS = 8
"""Channels added to hold the bias where the head has none to spare: kernels on a GPU take head dims in eights."""


def masked_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    key_bias_SBG: Tensor | None,
    *,
    free_window: int | None = 0,
    query_starts: Sequence[int] | None = None,
    documents: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """softmax_j(q_i k_j / sqrt(D) + bias_j [i - j > free_window]) v_j over j <= i of the same document.

    Args:
        q_TBND: rotated queries: the whole sequence, or chunks of it.
        k_SBGD: rotated keys of the whole sequence; N is a multiple of G.
        v_SBGD: values.
        key_bias_SBG: finite bias of each key; ``HIDDEN`` or below hides it. Not read where ``free_window`` is None.
        free_window: keys at most that many positions back carry no bias; None: no key does.
        query_starts: ascending or not, the positions at which the equally long chunks of the queries start
            (context parallelism). None: the queries are the whole sequence.
        documents: for each batch row the ascending start positions of its documents, the first 0; None: one each.

    Returns:
        Attention output [T, B, N, D]. Gradients flow to queries, keys, values and bias.

    Raises:
        ValueError: shapes, chunks or documents that do not fit together.
    """
    plan = plan_attention(q_TBND, k_SBGD, free_window=free_window, query_starts=query_starts, documents=documents)
    if v_SBGD.shape != k_SBGD.shape:
        raise ValueError(f"values {tuple(v_SBGD.shape)}: must have the shape of the keys, {tuple(k_SBGD.shape)}")
    if free_window is None:
        key_bias_SBG = None
    elif key_bias_SBG is None or key_bias_SBG.shape != k_SBGD.shape[:-1]:
        given = None if key_bias_SBG is None else tuple(key_bias_SBG.shape)
        raise ValueError(f"key bias {given}: must be [S, B, G] = {tuple(k_SBGD.shape[:-1])} like the keys")
    return _MaskedAttention.apply(q_TBND, k_SBGD, v_SBGD, key_bias_SBG, plan)


def plan_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    *,
    free_window: int | None,
    query_starts: Sequence[int] | None,
    documents: Sequence[Sequence[int]] | None,
) -> Plan:
    """Check the geometry and cut it into pieces; arguments and errors as in :func:`masked_attention`."""
    num_queries, batch, num_heads, head_dim = q_TBND.shape
    length, num_kv_heads = k_SBGD.shape[0], k_SBGD.shape[2]
    if (k_SBGD.shape[1], k_SBGD.shape[3]) != (batch, head_dim) or num_heads % num_kv_heads:
        raise ValueError(
            f"queries {tuple(q_TBND.shape)} and keys {tuple(k_SBGD.shape)}: batch and head dim must agree, "
            "and the query heads must be a multiple of the KV heads"
        )
    starts = [0] if query_starts is None else list(query_starts)
    _check_chunks(num_queries, length, starts)
    rows = [[0]] * batch if documents is None else [list(row) for row in documents]
    _check_documents(rows, batch, length)
    if free_window is not None and free_window < 0:
        raise ValueError(f"free_window={free_window}: must be >= 0, or None for no bias at all")
    pieces = cut(length, num_queries // len(starts), starts, rows, free_window)
    return Plan(pieces, free_window == 0, starts, head_dim**-0.5)


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


def _check_chunks(num_queries: int, length: int, starts: list[int]) -> None:
    if not starts or num_queries % len(starts) or num_queries == 0:
        raise ValueError(f"{num_queries} queries in {len(starts)} chunks: give query_starts for equally long chunks")
    chunk = num_queries // len(starts)
    outside = [start for start in starts if not 0 <= start <= length - chunk]
    if outside:
        raise ValueError(
            f"query_starts={starts}: chunks of {chunk} queries must lie within the sequence of {length} keys, "
            f"which those at {outside} do not"
        )


def _check_documents(rows: list[list[int]], batch: int, length: int) -> None:
    if len(rows) != batch:
        raise ValueError(f"documents of {len(rows)} rows for a batch of {batch}: give the start positions of each row")
    for row in rows:
        ascending = all(a < b for a, b in itertools.pairwise(row))
        if not row or row[0] != 0 or not ascending or row[-1] >= length:
            raise ValueError(f"document starts {row}: must ascend from 0 and stay below the sequence length {length}")

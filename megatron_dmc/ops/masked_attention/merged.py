"""Attention over pieces, merged by log-sum-exp, and its backward by the stock kernels.

The weight of pair (i, j) in the whole softmax is exp(score_ij - lse_i) with the merged lse, so each kernel's backward
is right as it is once it gets the merged output and log-sum-exp. Merging adds positive mass only: nothing cancels.

Shapes: B batch, N query heads, G KV heads, R = N / G, T queries, S keys, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.masked_attention.flash import kernel_for
from megatron_dmc.ops.masked_attention.pieces import Piece, Shape
from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.slices import row_slices

Operands = tuple[Tensor, Tensor, Tensor]
"""q [B, N, T, D], k and v [B, G, S, D], or their gradients."""


@dataclass(frozen=True)
class Plan:
    """What is visible: the pieces, and whether the queries' own positions come on top of them.

    ``query_starts``: positions at which the equally long chunks of the queries start. Free pieces and own positions
    use the ``near`` operands, biased pieces the ``far`` ones.
    """

    pieces: Sequence[Piece]
    own_position: bool
    query_starts: Sequence[int]
    scale: float


def attend(plan: Plan, near: Operands, far: Operands | None = None) -> tuple[Tensor, Tensor]:
    """Merged output [B, N, T, D], stored as [T, B, N, D], and log-sum-exp [B, N, T]."""
    q, k, v = near
    batch, num_heads, num_queries, _ = q.shape
    # Own positions fill everything; without them the pieces are merged with nothing.
    allocate = q.new_empty if plan.own_position else q.new_zeros
    out = allocate(num_queries, batch, num_heads, v.shape[-1]).permute(1, 2, 0, 3)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=accumulation_dtype(q.dtype), device=q.device)
    for queries, keys in _own_positions(plan, q):
        q_own, k_own, v_own = _own_operands(near, queries, keys)
        _grouped(lse[:, :, queries], k).copy_((q_own * k_own).sum(-1).mul_(plan.scale))
        _grouped(out[:, :, queries], k).copy_(v_own)
    for piece in plan.pieces:
        operands = far if piece.biased else near
        q_piece, k_piece, v_piece = (_oriented(piece, x) for x in _select(piece, operands))
        kernel = kernel_for(q_piece)
        found = kernel.forward(q_piece, k_piece, v_piece, piece.shape is not Shape.FULL, plan.scale)
        out_piece, lse_piece = (_oriented(piece, x) for x in found)
        seen = (piece.rows, slice(None), piece.queries)
        merge(out[seen], lse[seen], out_piece[..., : v.shape[-1]], lse_piece)
    return out, lse


def attend_backward(
    plan: Plan,
    near: Operands,
    far: Operands | None,
    results: tuple[Tensor, Tensor],
    grad_out: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the near and of the far operands; those of the own positions are among the far ones.

    ``results``: merged output and log-sum-exp; ``grad_out`` [B, N, T, D]. Where no piece is near (far), the list is
    empty.
    """
    near_grads: list[Tensor] = []
    far_grads: list[Tensor] = []
    for piece in plan.pieces:
        if piece.biased:
            _add_piece(plan, piece, far, results, grad_out, far_grads)
        else:
            _add_piece(plan, piece, near, results, grad_out, near_grads)
    if plan.own_position:
        assert far is not None
        far_grads = far_grads or [torch.zeros_like(x) for x in far]
    for queries, keys in _own_positions(plan, near[0]):
        _own_backward(plan, near, results, grad_out, far_grads, queries, keys)
    return near_grads, far_grads


def _add_piece(
    plan: Plan,
    piece: Piece,
    operands: Operands | None,
    results: tuple[Tensor, Tensor],
    grad_out: Tensor,
    totals: list[Tensor],
) -> None:
    """Add the gradients that come through one piece to ``totals``, which are made when they are empty."""
    assert operands is not None
    q, k, v = (_oriented(piece, x) for x in _select(piece, operands))
    seen = (piece.rows, slice(None), piece.queries)
    # Far operands may have more channels than the output: zeros, from which no gradient comes.
    grad, out = (_oriented(piece, _widened(x[seen], v.shape[-1])) for x in (grad_out, results[0]))
    lse = _oriented(piece, results[1][seen])
    found = list(kernel_for(q).backward(grad, q, k, v, out, lse, piece.shape is not Shape.FULL, plan.scale))
    first = not totals
    for index, operand in enumerate(operands):
        if first:
            totals.append(torch.zeros_like(operand))
        # Each part is let go once it is added: at one time there is little more than one set of gradients.
        total = _part(piece, index, totals[index])
        torch.add(total, _oriented(piece, found.pop(0)), out=total)


def _select(piece: Piece, operands: Operands | None) -> Operands:
    assert operands is not None, "a plan with biased pieces needs far operands"
    q, k, v = (_part(piece, index, x) for index, x in enumerate(operands))
    return q, k, v


def _part(piece: Piece, index: int, operand: Tensor) -> Tensor:
    """What a piece sees of q (index 0), k or v."""
    return operand[piece.rows, :, piece.keys if index else piece.queries]


def _widened(x: Tensor, channels: int) -> Tensor:
    return x if x.shape[-1] == channels else F.pad(x, (0, channels - x.shape[-1]))


def _oriented(piece: Piece, x: Tensor) -> Tensor:
    """Upper triangles become lower ones, and back, when queries and keys are taken in reverse order."""
    return x.flip(2) if piece.shape is Shape.UPPER else x


def merge(out: Tensor, lse: Tensor, out_piece: Tensor, lse_piece: Tensor) -> None:
    """Add a piece to ``out`` and ``lse`` in place."""
    merged = torch.logaddexp(lse, lse_piece)
    share = torch.exp(lse_piece - merged)[..., None]
    out.copy_(torch.lerp(out.to(share.dtype), out_piece.to(share.dtype), share))
    lse.copy_(merged)


def _own_positions(plan: Plan, q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of queries and of their own positions in the sequence, small enough for cheap temporaries."""
    if not plan.own_position:
        return
    chunk_length = q.shape[2] // len(plan.query_starts)
    for chunk, first in enumerate(plan.query_starts):
        begin = chunk * chunk_length
        for rows in row_slices(q[:, :, begin : begin + chunk_length], dim=2):
            yield slice(begin + rows.start, begin + rows.stop), slice(first + rows.start, first + rows.stop)


def _own_operands(operands: Operands, queries: slice, keys: slice) -> Operands:
    """Queries [B, G, R, rows, D] and their own keys and values [B, G, 1, rows, D], in the accumulation dtype."""
    q, k, v = operands
    own = (_grouped(q[:, :, queries], k), k[:, :, None, keys], v[:, :, None, keys])
    q, k, v = (x.to(accumulation_dtype(x.dtype)) for x in own)
    return q, k, v


def _grouped(x: Tensor, k: Tensor) -> Tensor:
    """Query heads split into KV heads and the queries of each: [B, N, ...] to [B, G, R, ...]."""
    return x.unflatten(1, (k.shape[1], -1))


def _own_backward(
    plan: Plan,
    near: Operands,
    results: tuple[Tensor, Tensor],
    grad_out: Tensor,
    grads: list[Tensor],
    queries: slice,
    keys: slice,
) -> None:
    """Add the gradients that come through own positions to ``grads``, which may have more channels."""
    q, k, v = _own_operands(near, queries, keys)
    out, lse, grad = (_grouped(x[:, :, queries], near[1]).to(q.dtype) for x in (*results, grad_out))
    weight = torch.exp((q * k).sum(-1).mul_(plan.scale).sub_(lse)).unsqueeze_(-1)
    grad_score = weight * ((v - out) * grad).sum(-1, keepdim=True) * plan.scale
    grad_q, grad_k, grad_v = (x[..., : y.shape[-1]] for x, y in zip(grads, near, strict=True))
    _grouped(grad_q[:, :, queries], near[1]).addcmul_(grad_score, k)
    grad_k[:, :, keys] += _group_sum(grad_score, q)
    grad_v[:, :, keys] += _group_sum(weight, grad)


def _group_sum(weight: Tensor, x: Tensor) -> Tensor:
    """Weighted sum over the queries of each KV head: [B, G, R, rows, D] to [B, G, rows, D]."""
    total = weight[:, :, 0] * x[:, :, 0]
    for r in range(1, x.shape[2]):
        total.addcmul_(weight[:, :, r], x[:, :, r])
    return total

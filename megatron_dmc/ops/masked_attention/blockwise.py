"""Attention by blocks of queries in plain torch operations: where no stock flash kernel takes the inputs.

Memory is linear in the sequence length: scores exist for BLOCK queries at a time.

Shapes: B batch, N query heads, G KV heads, R = N / G, T queries, S keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype

BLOCK = 128
"""Queries whose scores exist at one time."""


def forward(q_BNTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Output [B, N, T, D] and the log-sum-exp of the scores [B, N, T]; ``causal``: query i sees keys 0 to i."""
    dtype = accumulation_dtype(q_BNTD.dtype)
    out = torch.empty_like(q_BNTD)
    lse = torch.empty(q_BNTD.shape[:-1], dtype=dtype, device=q_BNTD.device)
    k, v = k_BGSD.to(dtype), v_BGSD.to(dtype)
    for rows in _blocks(q_BNTD):
        scores = _scores(q_BNTD[:, :, rows].to(dtype), k, rows, causal, scale)
        block_lse = scores.logsumexp(-1)
        weights = torch.exp(scores - block_lse[..., None])
        out[:, :, rows] = torch.einsum("bgrts,bgsd->bgrtd", weights, v).flatten(1, 2)
        lse[:, :, rows] = block_lse.flatten(1, 2)
    return out, lse


def backward(
    grad_BNTD: Tensor,
    q_BNTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    out_BNTD: Tensor,
    lse_BNT: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; ``out`` and ``lse`` may be those of a softmax over more keys than given here."""
    dtype = accumulation_dtype(q_BNTD.dtype)
    k, v = k_BGSD.to(dtype), v_BGSD.to(dtype)
    grad_q, grad_k, grad_v = torch.empty_like(q_BNTD), torch.zeros_like(k), torch.zeros_like(v)
    groups = (k.shape[1], -1)
    for rows in _blocks(q_BNTD):
        q, grad, out = (x[:, :, rows].to(dtype).unflatten(1, groups) for x in (q_BNTD, grad_BNTD, out_BNTD))
        lse = lse_BNT[:, :, rows].unflatten(1, groups)
        weights = torch.exp(_scores(q.flatten(1, 2), k, rows, causal, scale) - lse[..., None])
        grad_v += torch.einsum("bgrts,bgrtd->bgsd", weights, grad)
        delta = (grad * out).sum(-1, keepdim=True)
        grad_scores = weights * (torch.einsum("bgrtd,bgsd->bgrts", grad, v) - delta) * scale
        grad_q[:, :, rows] = torch.einsum("bgrts,bgsd->bgrtd", grad_scores, k).flatten(1, 2)
        grad_k += torch.einsum("bgrts,bgrtd->bgsd", grad_scores, q)
    return grad_q, grad_k.to(k_BGSD.dtype), grad_v.to(v_BGSD.dtype)


def _blocks(q_BNTD: Tensor) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, q_BNTD.shape[2], BLOCK)]


def _scores(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """Scores [B, G, R, block, S] of the queries ``rows``."""
    scores = torch.einsum("bgrtd,bgsd->bgrts", q.unflatten(1, (k.shape[1], -1)), k) * scale
    if not causal:
        return scores
    i = torch.arange(rows.start, rows.start + q.shape[2], device=k.device)[:, None]
    return scores.masked_fill(torch.arange(k.shape[2], device=k.device) > i, -torch.inf)

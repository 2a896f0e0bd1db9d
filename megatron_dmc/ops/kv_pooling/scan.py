"""The gated scan y_t = decay_t y_{t-1} + gain_t x_t, and its backward, as a blocked scan.

All blocks run side by side from state zero; the states between blocks are the same scan over the ends of the blocks,
and are added last: linear time and memory, about 2 BLOCK log(S) / log(BLOCK) operations on many positions at once
instead of S on one. Sums are float32 (float64 for float64 inputs).

Shapes: S sequence, B batch, G KV heads, D channels.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype, without_negligible
from megatron_dmc.ops.slices import row_slices

BLOCK = 16
"""Positions per block: fewer make more levels, more make longer chains of smaller operations."""


def gated_scan(decay_SBG: Tensor, gain_SBG: Tensor | None, x_SBGD: Tensor, reverse: bool = False) -> Tensor:
    """y_t = decay_t y_{t-1} + gain_t x_t with y before the start 0; float32 [S, B, G, D].

    Args:
        decay_SBG: float32 weights of the past, within [0, 1].
        gain_SBG: float32 weights of the inputs; None = 1.
        x_SBGD: inputs of any dtype and strides.
        reverse: run from the end: y_t = decay_t y_{t+1} + gain_t x_t.
    """
    y_SBGD = torch.empty(x_SBGD.shape, dtype=accumulation_dtype(x_SBGD.dtype), device=x_SBGD.device)
    _scan(decay_SBG, gain_SBG, x_SBGD, y_SBGD, torch.zeros_like(y_SBGD[0]), reverse)
    return y_SBGD


def _scan(decay: Tensor, gain: Tensor | None, x: Tensor, y: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Fill ``y`` and return the state after the last position; ``state`` is that before the first."""
    length = x.shape[0]
    whole = length - length % BLOCK
    parts = [(slice(0, whole), BLOCK), (slice(whole, length), length - whole)]
    for part, block in reversed(parts) if reverse else parts:
        if part.stop > part.start:
            in_blocks = functools.partial(_in_blocks, part=part, block=block)
            gain_blocks = None if gain is None else in_blocks(gain)
            state = _scan_blocks(in_blocks(decay), gain_blocks, in_blocks(x), in_blocks(y), state, reverse)
    return state


def _in_blocks(x: Tensor, part: slice, block: int) -> Tensor:
    return x[part].unflatten(0, (-1, block))


def _scan_blocks(decay: Tensor, gain: Tensor | None, x: Tensor, y: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """The same for views [blocks, block, ...] in whole blocks."""
    num_blocks = x.shape[0]
    reach = without_negligible(decay.flip(1).cumprod(1).flip(1) if reverse else decay.cumprod(1))
    if gain is None:
        y.copy_(x)
    else:
        torch.mul(x, gain[..., None], out=y)
    # One operation per position: on short sequences the time goes into calls, not into numbers.
    order = slice(None, None, -1 if reverse else 1)
    states, decays = y.unbind(1)[order], decay[..., None].unbind(1)[order]
    for before, now, decay_now in zip(states[:-1], states[1:], decays[1:], strict=True):
        now.addcmul_(decay_now, before)
    entering = torch.empty_like(y[:, 0])
    entering[-1 if reverse else 0] = state
    if num_blocks > 1:
        # The states between blocks are themselves a scan over the ends of the blocks.
        ends = slice(1, None) if reverse else slice(0, -1)
        left = slice(0, -1) if reverse else slice(1, None)
        last = 0 if reverse else -1
        _scan(reach[ends, last], None, y[ends, last], entering[left], state, reverse)
    y.addcmul_(reach[..., None], entering[:, None])
    return states[-1][0 if reverse else -1]


def gated_scan_backward(
    decay_SBG: Tensor, gain_SBG: Tensor, x_SBGD: Tensor, y_SBGD: Tensor, grad_SBGD: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_scan` from its inputs, its output and the gradient of its output.

    Returns:
        float32 gradient of x [S, B, G, D], and [S, B, G] twice: <u, x - y_before>, which is the gradient of a gain
        whose decay is 1 - gain, free of cancellation, and <u, y_before>, the gradient of the decay. Their sum is the
        gradient of a gain that is independent of the decay.
    """
    u_SBGD = gated_scan(shift(decay_SBG, 1 if reverse else -1), None, grad_SBGD, not reverse)
    along_gate = torch.empty_like(gain_SBG)
    along_decay = torch.empty_like(gain_SBG)
    for rows in row_slices(x_SBGD):
        u, before = u_SBGD[rows], _before(y_SBGD, rows, reverse)
        along_gate[rows] = (x_SBGD[rows] - before).mul_(u).sum(-1)
        along_decay[rows] = (u * before).sum(-1)
    return u_SBGD.mul_(gain_SBG[..., None]), along_gate, along_decay


def shift(x: Tensor, steps: int) -> Tensor:
    """``x`` moved along the sequence by ``steps`` positions (positive: later), zeros moved in."""
    moved = torch.zeros_like(x)
    if steps >= 0:
        moved[steps:] = x[: max(0, x.shape[0] - steps)]
    else:
        moved[:steps] = x[-steps:]
    return moved


def _before(y: Tensor, rows: slice, reverse: bool) -> Tensor:
    """The states from which the rows were reached: the previous row, or in reverse the next; 0 at the start."""
    stop = min(rows.stop, y.shape[0])
    if reverse:
        inside = y[rows.start + 1 : stop + 1]
        return inside if stop < y.shape[0] else torch.cat((inside, torch.zeros_like(y[:1])))
    inside = y[max(0, rows.start - 1) : stop - 1]
    return inside if rows.start else torch.cat((torch.zeros_like(y[:1]), inside))

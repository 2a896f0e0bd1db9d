"""The gated scan y_t = decay_t y_{t-1} + gain_t x_t, and its backward, as a two-level blocked scan.

Level one runs all blocks side by side, level two carries the state from block to block: linear time and memory,
about twice sqrt(S) vector operations instead of S. Sums are float32 (float64 for float64 inputs).

Shapes: S sequence, B batch, G KV heads, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype

DOT_ROWS = 512
"""Positions per slice of a dot product over channels, so that the product needs little memory."""


def gated_scan(decay_SBG: Tensor, gain_SBG: Tensor | None, x_SBGD: Tensor, reverse: bool = False) -> Tensor:
    """y_t = decay_t y_{t-1} + gain_t x_t with y before the start 0; float32 [S, B, G, D].

    Args:
        decay_SBG: float32 weights of the past, within [0, 1].
        gain_SBG: float32 weights of the inputs; None = 1.
        x_SBGD: inputs of any dtype and strides.
        reverse: run from the end: y_t = decay_t y_{t+1} + gain_t x_t.
    """
    y_SBGD = torch.empty(x_SBGD.shape, dtype=accumulation_dtype(x_SBGD.dtype), device=x_SBGD.device)
    length = x_SBGD.shape[0]
    block = block_size(length)
    whole = length - length % block
    state = torch.zeros_like(y_SBGD[0])
    parts = [(slice(0, whole), block), (slice(whole, length), length - whole)]
    for part, block in reversed(parts) if reverse else parts:
        if part.stop > part.start:
            decay, x, y = (_blocks(t, part, block) for t in (decay_SBG, x_SBGD, y_SBGD))
            gain = None if gain_SBG is None else _blocks(gain_SBG, part, block)
            state = _scan_blocks(decay, gain, x, y, state, reverse)
    return y_SBGD


def _blocks(x: Tensor, part: slice, block: int) -> Tensor:
    """A view [blocks, block, ...] of some positions."""
    return x[part].unflatten(0, (-1, block))


def block_size(length: int) -> int:
    """Positions per block: the power of two next to sqrt(S), since both levels then take as many steps."""
    return 1 << (length.bit_length() // 2)


def _scan_blocks(decay: Tensor, gain: Tensor | None, x: Tensor, y: Tensor, state: Tensor, reverse: bool) -> Tensor:
    """Fill ``y`` [blocks, block, B, G, D] and return the state after the last block; ``state`` enters the first."""
    num_blocks, block = x.shape[:2]
    steps = range(block)[::-1] if reverse else range(block)
    first, last = steps[0], steps[-1]
    reach = decay.flip(1).cumprod(1).flip(1) if reverse else decay.cumprod(1)
    decay, reach = decay[..., None], reach[..., None]
    for now in steps:
        before = now + 1 if reverse else now - 1
        y_now, gained = y[:, now], x[:, now]
        if gain is not None:
            gained = torch.mul(gained, gain[:, now, ..., None], out=y_now)
        if now == first:
            y_now.copy_(gained)
        else:
            torch.addcmul(gained.to(y.dtype), decay[:, now], y[:, before], out=y_now)
    entering = torch.empty_like(y[:, 0])
    for b in range(num_blocks)[::-1] if reverse else range(num_blocks):
        entering[b] = state
        state = torch.addcmul(y[b, last], reach[b, last], state)
    y.addcmul_(reach, entering[:, None])
    return state


def gated_scan_backward(
    decay_SBG: Tensor, gain_SBG: Tensor, x_SBGD: Tensor, y_SBGD: Tensor, grad_SBGD: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`gated_scan` from its inputs, its output and the gradient of its output.

    Returns:
        float32 gradient of x [S, B, G, D], and [S, B, G] twice: <u, x - y_before>, which is the gradient of a gain
        whose decay is 1 - gain, free of cancellation, and <u, y_before>, the gradient of the decay. Their sum is the
        gradient of a gain that is independent of the decay.
    """
    u_SBGD = gated_scan(shift(decay_SBG, -1 if not reverse else 1), None, grad_SBGD, not reverse)
    along_gate = torch.empty_like(gain_SBG)
    along_decay = torch.empty_like(gain_SBG)
    for start in range(0, x_SBGD.shape[0], DOT_ROWS):
        rows = slice(start, start + DOT_ROWS)
        u, before = u_SBGD[rows], _before(y_SBGD, rows, reverse)
        along_decay[rows] = (u * before).sum(-1)
        along_gate[rows] = (u * (x_SBGD[rows] - before)).sum(-1)
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

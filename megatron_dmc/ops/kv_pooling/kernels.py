"""The gated scan of ``scan.py`` and its backward as Triton kernels for GPUs.

One program walks one (sequence, KV head) and one block of channels from tile to tile. Inside a tile of BLOCK_S
positions the states are a lower-triangular matrix times the inputs; its entries are products of decays, each computed
as a running product, so that nothing is divided and no logarithm taken. Running backwards means loading the positions
in reverse order: one kernel body for both directions. Dot products over channels are stored per block of channels and
added afterwards: no atomics, the same bits every time.

Shapes: S sequence, B batch, G KV heads, D channels.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of kernels as its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_S = 32
MIN_BLOCK_D, MAX_BLOCK_D = 16, 64  # tl.dot takes 16 columns or more


@triton.jit
def _scan_tile(decay, gained, state, BLOCK_S: tl.constexpr):
    """States [BLOCK_S, BLOCK_D] after each row of a tile that is entered with ``state``, and the last of them."""
    t = tl.arange(0, BLOCK_S)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    # What is left at t of the input at s: the product of the decays after s, up to t.
    left = tl.cumprod(tl.where(t > s, decay, 1.0), 0)
    local = tl.dot(tl.where(t >= s, left, 0.0), gained, input_precision="ieee")
    states = local + tl.cumprod(decay, 0) * state[None, :]
    return states, tl.sum(tl.where(t == BLOCK_S - 1, states, 0.0), 0)


@triton.jit
def _scan_kernel(
    decay_ptr,
    gain_ptr,
    x_ptr,
    y_ptr,
    length,
    num_channels,
    batch,
    num_heads,
    x_stride_s,
    x_stride_b,
    x_stride_g,
    REVERSE: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)  # sequence * num_heads + head
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    lanes = batch * num_heads
    x_lane = x_ptr + (lane // num_heads) * x_stride_b + (lane % num_heads) * x_stride_g
    state = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(0, length, BLOCK_S):
        step = tile + tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
        inside = step < length
        position = length - 1 - step if REVERSE else step
        mask = inside & (channels < num_channels)
        # Rows beyond the end pass the state on: decay 1, nothing gained.
        decay = tl.load(decay_ptr + position * lanes + lane, mask=inside, other=1.0)
        gained = tl.load(x_lane + position * x_stride_s + channels, mask=mask, other=0.0).to(tl.float32)
        if HAS_GAIN:
            gained *= tl.load(gain_ptr + position * lanes + lane, mask=inside, other=0.0)
        states, state = _scan_tile(decay, gained, state, BLOCK_S)
        tl.store(y_ptr + (position * lanes + lane) * num_channels + channels, states, mask=mask)


@triton.jit
def _scan_backward_kernel(
    decay_ptr,
    gain_ptr,
    x_ptr,
    y_ptr,
    grad_y_ptr,
    grad_x_ptr,
    along_gate_ptr,
    along_decay_ptr,
    length,
    num_channels,
    batch,
    num_heads,
    x_stride_s,
    x_stride_b,
    x_stride_g,
    grad_stride_s,
    grad_stride_b,
    grad_stride_g,
    REVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    lanes = batch * num_heads
    sequence, head = lane // num_heads, lane % num_heads
    x_lane = x_ptr + sequence * x_stride_b + head * x_stride_g
    grad_lane = grad_y_ptr + sequence * grad_stride_b + head * grad_stride_g
    partial = tl.program_id(1).to(tl.int64) * length * lanes
    # The gradient flows against the scan: from the position that was reached last.
    before = 1 if REVERSE else -1
    state = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(0, length, BLOCK_S):
        step = tile + tl.arange(0, BLOCK_S)[:, None].to(tl.int64)
        inside = step < length
        position = step if REVERSE else length - 1 - step
        mask = inside & (channels < num_channels)
        has_later = inside & (step > 0)
        later_decay = tl.load(decay_ptr + (position - before) * lanes + lane, mask=has_later, other=0.0)
        later_decay = tl.where(inside, later_decay, 1.0)
        grad = tl.load(grad_lane + position * grad_stride_s + channels, mask=mask, other=0.0).to(tl.float32)
        u, state = _scan_tile(later_decay, grad, state, BLOCK_S)
        gain = tl.load(gain_ptr + position * lanes + lane, mask=inside, other=0.0)
        tl.store(grad_x_ptr + (position * lanes + lane) * num_channels + channels, u * gain, mask=mask)
        has_before = mask & (step < length - 1)
        y_before = tl.load(
            y_ptr + ((position + before) * lanes + lane) * num_channels + channels, mask=has_before, other=0.0
        )
        x = tl.load(x_lane + position * x_stride_s + channels, mask=mask, other=0.0).to(tl.float32)
        rows = partial + position * lanes + lane
        tl.store(along_decay_ptr + rows, tl.sum(u * y_before, 1)[:, None], mask=inside)
        tl.store(along_gate_ptr + rows, tl.sum(u * (x - y_before), 1)[:, None], mask=inside)


def gated_scan(decay_SBG: Tensor, gain_SBG: Tensor | None, x_SBGD: Tensor, reverse: bool = False) -> Tensor:
    """As :func:`megatron_dmc.ops.kv_pooling.scan.gated_scan`, float32 only."""
    x_SBGD = _with_dense_channels(x_SBGD)
    length, batch, num_heads, num_channels = x_SBGD.shape
    y_SBGD = torch.empty(x_SBGD.shape, dtype=torch.float32, device=x_SBGD.device)
    gain = decay_SBG if gain_SBG is None else gain_SBG
    with torch.cuda.device_of(x_SBGD):
        _scan_kernel[_grid(x_SBGD)](
            decay_SBG.contiguous(),
            gain.contiguous(),
            x_SBGD,
            y_SBGD,
            length,
            num_channels,
            batch,
            num_heads,
            *x_SBGD.stride()[:3],
            REVERSE=reverse,
            HAS_GAIN=gain_SBG is not None,
            BLOCK_S=BLOCK_S,
            BLOCK_D=_block_d(num_channels),
        )
    return y_SBGD


def gated_scan_backward(
    decay_SBG: Tensor, gain_SBG: Tensor, x_SBGD: Tensor, y_SBGD: Tensor, grad_SBGD: Tensor, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`megatron_dmc.ops.kv_pooling.scan.gated_scan_backward`, float32 only."""
    x_SBGD, grad_SBGD = _with_dense_channels(x_SBGD), _with_dense_channels(grad_SBGD)
    length, batch, num_heads, num_channels = x_SBGD.shape
    grid = _grid(x_SBGD)
    grad_x_SBGD = torch.empty(x_SBGD.shape, dtype=torch.float32, device=x_SBGD.device)
    along_gate, along_decay = (
        torch.empty((grid[1], *gain_SBG.shape), dtype=torch.float32, device=x_SBGD.device) for _ in range(2)
    )
    with torch.cuda.device_of(x_SBGD):
        _scan_backward_kernel[grid](
            decay_SBG.contiguous(),
            gain_SBG.contiguous(),
            x_SBGD,
            y_SBGD.contiguous(),
            grad_SBGD,
            grad_x_SBGD,
            along_gate,
            along_decay,
            length,
            num_channels,
            batch,
            num_heads,
            *x_SBGD.stride()[:3],
            *grad_SBGD.stride()[:3],
            REVERSE=reverse,
            BLOCK_S=BLOCK_S,
            BLOCK_D=_block_d(num_channels),
        )
    return grad_x_SBGD, along_gate.sum(0), along_decay.sum(0)


def _with_dense_channels(x_SBGD: Tensor) -> Tensor:
    return x_SBGD if x_SBGD.stride(-1) == 1 else x_SBGD.contiguous()


def _block_d(num_channels: int) -> int:
    return max(MIN_BLOCK_D, min(MAX_BLOCK_D, triton.next_power_of_2(num_channels)))


def _grid(x_SBGD: Tensor) -> tuple[int, int]:
    return x_SBGD.shape[1] * x_SBGD.shape[2], triton.cdiv(x_SBGD.shape[3], _block_d(x_SBGD.shape[3]))

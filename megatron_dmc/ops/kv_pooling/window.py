"""Windowed pooling: the mean over the last w tokens of the segment, in time and memory linear in S, whatever w.

The sequence is cut into blocks of w. A window that ends at offset o of a block is the last w - 1 - o tokens of the
block before, then the first o + 1 of its own: a suffix sum and a prefix sum (van Herk, 1992), each one gated scan.
Sums of non-negative weights only: nothing is added and subtracted again later.

    x_t = prefix_t + reach_t suffix_{t-w+1} ,   reach_t = alpha from the block's start to t

Shapes: S sequence, B batch, G KV heads, D head dim; T = S padded to whole blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling.dispatch import scans
from megatron_dmc.ops.kv_pooling.scan import shift
from megatron_dmc.ops.precision import without_negligible


class _Weights(NamedTuple):
    """float32 [S, B, G]: weights of the two scans and of their sum. ``starts`` [S, 1, 1]: first of a block."""

    starts: Tensor
    inside: Tensor  # alpha, 0 at the start of each block: decay of the prefix scan
    going_on: Tensor  # 1, 0 at the end of each block: decay of the suffix scan
    to_end: Tensor  # alpha from after s to the end of its block
    reach: Tensor  # alpha from the start of the block to t
    bridge: Tensor  # reach, 0 where the window does not touch the block before


def _weights(alpha: Tensor, window: int) -> _Weights:
    alpha = without_negligible(alpha)
    length = alpha.shape[0]
    offset = torch.arange(length, device=alpha.device) % window
    column = (slice(None),) + (None,) * (alpha.dim() - 1)
    starts, ends = (offset == 0)[column], (offset == window - 1)[column]
    padding = alpha.new_zeros(-length % window, *alpha.shape[1:])
    blocks = torch.cat((alpha, padding)).unflatten(0, (-1, window))
    reach = without_negligible(blocks.cumprod(1)).flatten(0, 1)[:length]
    after = torch.cat((blocks[:, 1:], torch.ones_like(blocks[:, :1])), dim=1)
    to_end = without_negligible(after.flip(1).cumprod(1).flip(1)).flatten(0, 1)[:length]
    bridge = reach.masked_fill(ends, 0.0)
    bridge[: window - 1] = 0.0
    going_on = torch.ones_like(alpha).masked_fill(ends, 0.0)
    return _Weights(starts, alpha.masked_fill(starts, 0.0), going_on, to_end, reach, bridge)


def _parts(x: Tensor, omega: Tensor, w: _Weights) -> tuple[Tensor, Tensor]:
    """Prefix and suffix sums of each block."""
    prefix = scans(x).gated_scan(w.inside, omega, x)
    return prefix, scans(x).gated_scan(w.going_on, w.to_end * omega, x, reverse=True)


def _window_sum(x: Tensor, omega: Tensor, w: _Weights, window: int) -> Tensor:
    """Weighted sums over each window."""
    total, suffix = _parts(x, omega, w)
    lag = window - 1
    total[lag:].addcmul_(w.bridge[lag:, ..., None], suffix[: max(0, x.shape[0] - lag)])
    return total


def pool(xs_SBGD: tuple[Tensor, ...], alpha_SBG: Tensor, omega_SBG: Tensor, window: int) -> tuple[Tensor, ...]:
    """Windowed means of each of ``xs_SBGD``, float32."""
    weights = _weights(alpha_SBG, window)
    z = _window_sum(torch.ones_like(omega_SBG)[..., None], omega_SBG, weights, window)
    return tuple(_window_sum(x, omega_SBG, weights, window).div_(z) for x in xs_SBGD)


def pool_backward(
    xs_SBGD: tuple[Tensor, ...],
    means_SBGD: tuple[Tensor, ...],
    grads_SBGD: tuple[Tensor, ...],
    alpha_SBG: Tensor,
    omega_SBG: Tensor,
    window: int,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Gradients of each of ``xs_SBGD``, of alpha and of omega, from the means and their gradients."""
    weights = _weights(alpha_SBG, window)
    ones = torch.ones_like(omega_SBG)[..., None]
    z = _window_sum(ones, omega_SBG, weights, window)
    sums = _WeightGradients(weights, omega_SBG, window)
    grad_z = torch.zeros_like(z)
    grad_xs = []
    for x, mean, grad in zip(xs_SBGD, means_SBGD, grads_SBGD, strict=True):
        grad_total = grad / z
        grad_z -= (grad_total * mean).sum(-1, keepdim=True)
        grad_xs.append(sums.add(x, grad_total))
    sums.add(ones, grad_z)
    return tuple(grad_xs), *sums.finish()


class _WeightGradients:
    """Gathers the gradients of the scan weights over keys, values and z, then turns them into alpha's and omega's."""

    def __init__(self, weights: _Weights, omega: Tensor, window: int) -> None:
        self.weights, self.omega, self.window = weights, omega, window
        self.inside, self.prefix_gain, self.suffix_gain, self.bridge = (torch.zeros_like(omega) for _ in range(4))

    def add(self, x: Tensor, grad_total: Tensor) -> Tensor:
        """Gradient of ``x``, given the gradient of its window sums."""
        w, lag = self.weights, self.window - 1
        reached = max(0, x.shape[0] - lag)
        prefix, suffix = _parts(x, self.omega, w)
        self.bridge[lag:] += (grad_total[lag:] * suffix[:reached]).sum(-1)
        grad_x, along_gate, along_decay = scans(x).gated_scan_backward(w.inside, self.omega, x, prefix, grad_total)
        self.inside += along_decay
        self.prefix_gain += along_gate + along_decay
        grad_suffix = torch.zeros_like(grad_total)
        torch.mul(grad_total[lag:], w.bridge[lag:, ..., None], out=grad_suffix[:reached])
        through_suffix, along_gate, along_decay = scans(x).gated_scan_backward(
            w.going_on, w.to_end * self.omega, x, suffix, grad_suffix, reverse=True
        )
        self.suffix_gain += along_gate + along_decay
        return grad_x.add_(through_suffix)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of alpha and omega."""
        w = self.weights
        # reach_t = alpha_t reach_{t-1} inside a block, with 1 before it; to_end_{s-1} = alpha_s to_end_s.
        grad_reach = _scan_scalars(shift(w.inside, -1), self.bridge * w.going_on, reverse=True)
        grad_to_end = _scan_scalars(w.inside, self.suffix_gain * self.omega, reverse=False)
        reach_before = shift(w.reach, 1).masked_fill(w.starts, 1.0)
        inside_block = self.inside + w.to_end * shift(grad_to_end, 1)
        grad_alpha = inside_block.masked_fill(w.starts, 0.0) + grad_reach * reach_before
        return grad_alpha, self.prefix_gain + w.to_end * self.suffix_gain


def _scan_scalars(decay: Tensor, x: Tensor, *, reverse: bool) -> Tensor:
    return scans(x).gated_scan(decay, None, x[..., None], reverse=reverse)[..., 0]

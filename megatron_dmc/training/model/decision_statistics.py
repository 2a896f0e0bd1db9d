"""The compression loss through layers, recompute and pipeline stages.

The loss of sequence b is ``max(0, target - f_b)`` with f_b the share of positive decisions over *all* layers, KV
heads and positions ([DMC] eq. 11; one hinge per sequence, whatever the layout). Its gradient with respect to any
decision is a constant times a gate that is 1 while the hinge is open. So forward only counts have to be summed, and
backward only the gate has to come back:

- a layer attaches its statistic to its output (:class:`AttachStatistic`); in backward it reads the gate;
- a pipeline stage appends one row to its output that carries the counts forward, and whose gradient carries the gate
  backward (:class:`AppendRow`, :class:`StripRow`).

Legend: S sequence, B batch, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dmc.training.model.microbatch import Microbatch

# Counts travel as base-256 digits: integers up to 256 are exact in bfloat16, and four digits hold 2**32 decisions.
_BASE = 256
_DIGITS = 4


class AttachStatistic(torch.autograd.Function):
    """Identity on ``output`` whose backward also feeds the compression loss into ``fraction_B``.

    ``share`` is the part of the whole model's decisions that ``fraction_B`` is the mean of, times the loss weight.
    """

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, fraction_B: torch.Tensor, share: float, microbatch: Microbatch) -> Any:
        ctx.share = share
        ctx.microbatch = microbatch
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        gate_B = ctx.microbatch.statistics.gate_B
        assert gate_B is not None, "the gate must be known before the backward pass of a layer"
        gate_B = gate_B.float()
        grad_fraction_B = -gate_B * (ctx.share / gate_B.numel()) * ctx.microbatch.gradient_scale.value
        return grad_outputs[0], grad_fraction_B, None, None


class AppendRow(torch.autograd.Function):
    """``hidden_SBH`` with one more row that holds the counts; backward takes the gate from that row's gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        ctx.microbatch = microbatch
        row = hidden_SBH.new_zeros((1, *hidden_SBH.shape[1:]))
        row[0, :, :_DIGITS] = _to_digits(microbatch.statistics.total_B()).to(row.dtype)
        return torch.cat([hidden_SBH, row])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        ctx.microbatch.statistics.gate_B = grad_outputs[0][-1, :, 0].float()
        return grad_outputs[0][:-1], None


class StripRow(torch.autograd.Function):
    """Takes the row of :class:`AppendRow` off and reads it; backward returns the gate in its place."""

    @staticmethod
    def forward(ctx: Any, received_SBH: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        ctx.microbatch = microbatch
        microbatch.statistics.received_B = _from_digits(received_SBH[-1, :, :_DIGITS])
        return received_SBH[:-1].clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grad = grad_outputs[0]
        row = grad.new_zeros((1, *grad.shape[1:]))
        row[0, :, 0] = ctx.microbatch.statistics.gate_B.to(grad.dtype)
        return torch.cat([grad, row]), None


def _to_digits(count_B: torch.Tensor) -> torch.Tensor:
    """int64 [B] -> [B, digits], least significant first."""
    return torch.stack([(count_B // _BASE**place) % _BASE for place in range(_DIGITS)], dim=-1)


def _from_digits(digits: torch.Tensor) -> torch.Tensor:
    """[B, digits] of any float dtype -> int64 [B]."""
    places = torch.tensor([_BASE**place for place in range(_DIGITS)], dtype=torch.int64, device=digits.device)
    return (digits.round().to(torch.int64) * places).sum(dim=-1)

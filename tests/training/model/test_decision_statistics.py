"""Counts and gates that travel with the hidden states."""

import pytest
import torch

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.training.model.decision_statistics import AppendRow, AttachStatistic, StripRow
from megatron_dmc.training.model.microbatch import GradientScale, Microbatch, Statistics

COUNTS = [0, 1, 255, 256, 65_535, 16_777_217, 2**32 - 1]


def microbatch_with(counts=None, **given):
    statistics = Statistics() if counts is None else Statistics(decided_B={1: torch.tensor(counts)})
    return Microbatch(Geometry(8, 1), statistics=statistics, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_counts_survive_the_row_exactly(dtype):
    sender, receiver = microbatch_with(COUNTS), microbatch_with()
    hidden_SBH = torch.randn(3, len(COUNTS), 16, dtype=dtype)
    sent = AppendRow.apply(hidden_SBH, sender)
    assert sent.shape == (4, len(COUNTS), 16)
    assert sent.dtype == dtype
    received = StripRow.apply(sent, receiver)
    assert torch.equal(received, hidden_SBH)
    assert receiver.statistics.received_B.tolist() == COUNTS


def test_a_middle_stage_adds_its_layers():
    middle = microbatch_with([3, 4])
    middle.statistics.decided_B[2] = torch.tensor([10, 20])
    StripRow.apply(AppendRow.apply(torch.zeros(2, 2, 8), microbatch_with([100, 300])), middle)
    assert middle.statistics.total_B().tolist() == [113, 324]


def test_a_repeated_layer_counts_once():
    microbatch = microbatch_with([3])
    microbatch.statistics.decided_B[1] = torch.tensor([3])
    assert microbatch.statistics.total_B().tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_returns_through_the_row_and_gradients_pass(dtype):
    last, first = microbatch_with(), microbatch_with([5, 6])
    last.statistics.gate_B = torch.tensor([1.0, 0.0])
    hidden_SBH = torch.randn(3, 2, 8, dtype=dtype, requires_grad=True)
    received = StripRow.apply(AppendRow.apply(hidden_SBH, first), last)
    upstream = torch.randn_like(received)
    received.backward(upstream)
    assert torch.equal(hidden_SBH.grad, upstream)
    assert first.statistics.gate_B.tolist() == [1.0, 0.0]


def test_an_attached_statistic_gets_the_gradient_of_its_hinge():
    microbatch = microbatch_with(gradient_scale=GradientScale(torch.tensor([0.5])))
    microbatch.statistics.gate_B = torch.tensor([1.0, 0.0, 1.0, 1.0])
    output = torch.randn(2, 4, 3, requires_grad=True)
    fraction_B = torch.rand(4, requires_grad=True)
    attached = AttachStatistic.apply(output, fraction_B, 0.25, microbatch)
    assert torch.equal(attached, output)
    upstream = torch.randn_like(attached)
    attached.backward(upstream)
    assert torch.equal(output.grad, upstream)
    # d/df of 0.5 * 0.25 * mean_b max(0, target - f_b): -0.5 * 0.25 / 4 where the hinge is open.
    assert fraction_B.grad.tolist() == [-0.03125, 0.0, -0.03125, -0.03125]


def test_the_gradient_scale_is_read_in_backward():
    scale = GradientScale()
    microbatch = microbatch_with(gradient_scale=scale)
    microbatch.statistics.gate_B = torch.ones(1)
    fraction_B = torch.rand(1, requires_grad=True)
    attached = AttachStatistic.apply(torch.zeros(1, requires_grad=True), fraction_B, 1.0, microbatch)
    scale.set(torch.tensor([4.0]))
    attached.sum().backward()
    assert fraction_B.grad.tolist() == [-4.0]

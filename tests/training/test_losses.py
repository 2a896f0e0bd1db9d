"""The losses of a micro-batch, by hand."""

import pytest
import torch

from megatron_dmc.training.losses import compression_loss, sum_over_tokens


def test_only_tokens_that_count_are_summed():
    total, count = sum_over_tokens(
        torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]).bool()
    )
    assert (total.item(), count.item(), count.dtype) == (13.0, 3, torch.int32)


def test_the_compression_loss_pulls_from_below_alone():
    fraction_B = torch.tensor([0.25, 0.5, 0.75], requires_grad=True)
    loss_B = compression_loss(fraction_B, 0.5)
    assert loss_B.tolist() == pytest.approx([0.25, 0.0, 0.0])
    loss_B.sum().backward()
    assert fraction_B.grad[0] == -1
    assert fraction_B.grad[2] == 0

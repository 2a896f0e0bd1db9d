"""RMSNorm under sequence parallelism."""

from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.training.model.norm import DMCRMSNorm


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_says_whether_its_gradient_is_partial(sequence_parallel):
    norm = DMCRMSNorm(SimpleNamespace(sequence_parallel=sequence_parallel), 8)
    assert norm.weight.sequence_parallel is sequence_parallel


def test_it_divides_by_the_root_mean_square():
    norm = DMCRMSNorm(SimpleNamespace(sequence_parallel=False), hidden_size=6, eps=1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(4, 6)
    expected = x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-3) * norm.weight
    torch.testing.assert_close(norm(x), expected)

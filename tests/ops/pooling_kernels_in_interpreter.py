"""Tests of the Triton kernels, run by ``test_pooling_kernels.py`` in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling import kernels, pool_kv, scan, segment, window
from megatron_dmc.ops.kv_pooling.reference import pool_kv as plain_pool_kv
from tests.ops.comparison import assert_same
from tests.ops.test_kv_pooling import pooling_inputs
from tests.tolerances import OUTPUT, output_error


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run pooling through the kernels although the tensors are on a CPU."""
    for form in (segment, window):
        monkeypatch.setattr(form, "scans", lambda x: kernels)


@pytest.mark.parametrize(("length", "window_size"), [(1, 0), (63, 0), (111, 0), (1, 12), (63, 1), (63, 16), (111, 12)])
def test_equals_loop_over_time(length: int, window_size: int) -> None:
    inputs = [x[:, 1::2] for x in pooling_inputs(length, 1, 3, torch.float32)]
    assert_same(lambda *x: pool_kv(*x, window_size), lambda *x: plain_pool_kv(*x, window_size), inputs)


@pytest.mark.parametrize("head_dim", [16, 100, 128])
def test_head_dims_and_bfloat16(head_dim: int) -> None:
    inputs = [x[:, 1::2] for x in pooling_inputs(40, 1, head_dim, torch.bfloat16)]
    assert_same(lambda *x: pool_kv(*x, 0), lambda *x: plain_pool_kv(*x, 0), inputs)


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_of_strided_slices_equals_torch(reverse: bool) -> None:
    torch.manual_seed(0)
    decay, gain = torch.rand(2, 70, 2, 2)
    x = torch.randn(70, 2, 2, 8)[..., 5:]
    for chosen in (gain, None):
        assert_close(kernels.gated_scan(decay, chosen, x, reverse), scan.gated_scan(decay, chosen, x, reverse))


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_backward_equals_torch(reverse: bool) -> None:
    torch.manual_seed(0)
    decay, gain = torch.rand(2, 70, 2, 2)
    x, grad = torch.randn(2, 70, 2, 2, 8)[..., 5:]
    y = scan.gated_scan(decay, gain, x, reverse)
    found = kernels.gated_scan_backward(decay, gain, x, y, grad, reverse)
    for a, b in zip(found, scan.gated_scan_backward(decay, gain, x, y, grad, reverse), strict=True):
        assert_close(a, b)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert output_error(found, expected) <= 4 * OUTPUT[torch.float32]

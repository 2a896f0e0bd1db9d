"""Pooling: the linear forms against the loop over time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling import pool_kv, segment
from megatron_dmc.ops.kv_pooling import window as window_form
from megatron_dmc.ops.kv_pooling.reference import pool_kv as plain_pool_kv
from tests.ops.comparison import assert_same

ROWS = ("soft", "nearly hard", "all append", "all accumulate")
"""Decisions of the batch rows."""


def pooling_inputs(length: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys, values, alpha with 0 at the first position and one kind of decisions per row, omega."""
    torch.manual_seed(0)
    k, v = torch.randn(2, length, len(ROWS), num_kv_heads, head_dim).to(dtype)
    alpha = torch.rand(k.shape[:-1])
    alpha[:, 1] = torch.sigmoid(30 * torch.randn(length, num_kv_heads))
    alpha[:, 2] = 0
    alpha[:, 3] = 1
    alpha[0] = 0
    return [k, v, alpha.to(dtype), (torch.rand(k.shape[:-1]) + 0.1).to(dtype)]


@pytest.mark.parametrize("window", [0, 1, 2, 12, 16])
@pytest.mark.parametrize("length", [1, 63, 111])
def test_equals_loop_over_time(length: int, window: int) -> None:
    inputs = pooling_inputs(length, 2, 3, torch.float64)
    assert_same(lambda *x: pool_kv(*x, window), lambda *x: plain_pool_kv(*x, window), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 12])
@pytest.mark.parametrize("head_dim", [16, 100])
def test_accumulates_in_float32(head_dim: int, window: int, dtype: torch.dtype) -> None:
    inputs = pooling_inputs(70, 2, head_dim, dtype)
    assert_same(lambda *x: pool_kv(*x, window), lambda *x: plain_pool_kv(*x, window), inputs)


def test_long_segment_loses_no_precision() -> None:
    """One segment of 5,000 bfloat16 tokens: a bfloat16 sum would stop growing after some hundred."""
    k, v, alpha, omega = (x[:, 3:] for x in pooling_inputs(5000, 1, 2, torch.bfloat16))
    pooled, _ = pool_kv(k + 1, v, alpha, omega)
    mean = (omega.double()[..., None] * (k + 1).double()).sum(0) / omega.double()[..., None].sum(0)
    torch.testing.assert_close(pooled[-1].double(), mean, rtol=2**-8, atol=0)


def test_small_decisions_make_no_denormal_numbers() -> None:
    """Products of small alphas would be denormal, and a CPU then computes many times slower."""
    k, v, alpha, omega = pooling_inputs(70, 1, 2, torch.float32)
    small = torch.full_like(alpha, 1e-15)
    for weights in (window_form._weights(small, 5), segment.gates(small * 1e-24, omega)):
        for weight in weights:
            assert not ((weight > 0) & (weight < torch.finfo(torch.float32).tiny)).any()
    for window in (0, 5):
        torch.testing.assert_close(pool_kv(k, v, small, omega, window)[0], k)


def test_window_longer_than_sequence_is_whole_segment() -> None:
    inputs = pooling_inputs(40, 2, 4, torch.float32)
    for windowed, whole in zip(pool_kv(*inputs, 41), pool_kv(*inputs, 0), strict=True):
        assert torch.equal(windowed, whole)


def test_takes_slices_of_a_fused_projection() -> None:
    """Keys and values with strides of a larger tensor, as Megatron's fused projection gives them."""
    _, _, alpha, omega = pooling_inputs(70, 2, 4, torch.float64)
    fused = torch.randn(70, 4, 2, 16, dtype=torch.float64)
    k, v = fused[..., 8:12], fused[..., 12:]
    for found, expected in zip(pool_kv(k, v, alpha, omega), plain_pool_kv(k, v, alpha, omega), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [0, 3])
def test_gradcheck(window: int) -> None:
    inputs = [x[:, :1].contiguous().requires_grad_() for x in pooling_inputs(7, 1, 2, torch.float64)]
    torch.autograd.gradcheck(lambda *x: pool_kv(*x, window), inputs, fast_mode=True)


def test_wrong_inputs_are_named() -> None:
    k, v, alpha, omega = pooling_inputs(8, 2, 4, torch.float32)
    with pytest.raises(ValueError, match="window_size=-1: must be >= 0"):
        pool_kv(k, v, alpha, omega, -1)
    with pytest.raises(ValueError, match=r"alpha \(8, 4\): must be \[S, B, G\]"):
        pool_kv(k, v, alpha[..., 0], omega)
    with pytest.raises(ValueError, match="give both as"):
        pool_kv(k, v[1:], alpha, omega)

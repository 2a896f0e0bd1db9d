"""Decisions and importances from the borrowed channel."""

from __future__ import annotations

import pytest
import torch

from megatron_dmc.ops import decisions


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 3), (4, 1)])
def test_importance_is_the_mean_over_the_query_heads_of_a_group(num_heads: int, num_kv_heads: int) -> None:
    q = torch.randn(5, 2, num_heads, 8)
    found = decisions.importance_logits(q, num_kv_heads, 5.0)
    group = num_heads // num_kv_heads
    for g in range(num_kv_heads):
        torch.testing.assert_close(found[:, :, g], q[:, :, g * group : (g + 1) * group, -1].mean(-1) + 5)


def test_evictions_are_read_from_the_first_query_head_of_a_group() -> None:
    q = torch.randn(5, 2, 6, 8)
    found = decisions.first_query_logits(q, 3, 5.0)
    assert torch.equal(found, q[:, :, ::2, -1] - 5)
    assert decisions.first_query_logits(q.bfloat16(), 3, 5.0).dtype == torch.float32


def test_an_adapter_is_scaled() -> None:
    adapter = torch.tensor([[-0.1, 0.0, 0.05, 0.1]])
    torch.testing.assert_close(decisions.adapter_logits(adapter, 5.0), torch.tensor([[-15.0, -5.0, 0.0, 5.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_logits_are_at_least_float32(dtype: torch.dtype) -> None:
    k = torch.randn(5, 2, 3, 8).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    logits = decisions.decision_logits(k, 5.0)
    assert logits.dtype == decisions.importance_logits(k, 3, 5.0).dtype == expected
    assert torch.equal(logits, k[..., -1].to(expected) - 5)


def test_threshold_is_strict() -> None:
    logits = torch.tensor([-1.0, 0.0, 1e-7, 0.0078125, 0.0078126])
    assert decisions.hard_decisions(logits, 0.0).tolist() == [False, False, True, True, True]
    assert decisions.hard_decisions(logits, 0.0078125).tolist() == [False, False, False, False, True]


def test_importance_is_never_zero() -> None:
    assert (decisions.importance(torch.tensor([-1e4, 0.0, 1e4]), 1e-6) >= 1e-6).all()


def test_relaxation_becomes_hard_at_low_temperature() -> None:
    logits, noise = torch.randn(2, 100)
    relaxed = torch.sigmoid(decisions.relaxed_logits(logits, noise, 1e-6))
    assert torch.equal(relaxed > 0.5, logits + noise > 0)
    assert ((relaxed < 1e-3) | (relaxed > 1 - 1e-3)).float().mean() > 0.99

"""From logits to tokens."""

import pytest
import torch

from megatron_dmc.inference.sampling import SamplingParams, sample

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])


def sampled(uniform, temperature=1.0, top_p=1.0):
    """Tokens for many uniform numbers."""
    logits_BV = PROBABILITIES.log().expand(len(uniform), -1)
    return sample(
        logits_BV, torch.full_like(uniform, temperature), torch.full_like(uniform, top_p, dtype=torch.float64), uniform
    )


def test_temperature_zero_takes_the_most_likely():
    assert sampled(torch.rand(10), temperature=0.0).tolist() == [1] * 10


def test_frequencies_are_the_probabilities():
    uniform = torch.linspace(0, 1, 10001)[:-1]
    counts = torch.bincount(sampled(uniform), minlength=4) / len(uniform)
    torch.testing.assert_close(counts, PROBABILITIES, atol=1e-3, rtol=0)


def test_temperature_sharpens():
    uniform = torch.linspace(0, 1, 10001)[:-1]
    counts = torch.bincount(sampled(uniform, temperature=0.5), minlength=4) / len(uniform)
    torch.testing.assert_close(counts, PROBABILITIES**2 / (PROBABILITIES**2).sum(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3, 2})])
def test_nucleus_is_the_smallest_that_reaches_top_p(top_p, nucleus):
    uniform = torch.linspace(0, 1, 1001)[:-1]
    tokens = sampled(uniform, top_p=top_p)
    assert set(tokens.tolist()) == nucleus
    kept = torch.tensor([p if token in nucleus else 0.0 for token, p in enumerate(PROBABILITIES.tolist())])
    counts = torch.bincount(tokens, minlength=4) / len(uniform)
    torch.testing.assert_close(counts, kept / kept.sum(), atol=2e-3, rtol=0)


def test_greedy_and_sampled_rows_mix():
    logits_BV = PROBABILITIES.log().expand(2, -1)
    tokens = sample(logits_BV, torch.tensor([0.0, 1.0]), torch.ones(2), torch.tensor([0.99, 0.99]))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize(
    "wrong",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be"):
        SamplingParams(**wrong)

"""From logits to tokens, beside transformers' logits processors."""

import pytest
import torch

from megatron_dmc.inference.sampling import SamplingParams, draw, penalize, probabilities, sample

PROBABILITIES = torch.tensor([0.1, 0.5, 0.15, 0.25])
SETTINGS = [
    {"temperature": 0.3},
    {"temperature": 1.7, "top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"top_k": 1000, "top_p": 0.01},
    {"temperature": 5.0, "min_p": 1.0},
    {"temperature": 9.0, "top_p": 0.9},
]


def sampled(uniform, **settings):
    """Tokens for many uniform numbers."""
    logits_BV = PROBABILITIES.log().expand(len(uniform), -1)
    return sample(logits_BV, [SamplingParams(temperature=1.0, **settings)] * len(uniform), uniform.tolist())


def test_temperature_zero_takes_the_most_likely():
    logits_BV = PROBABILITIES.log().expand(10, -1)
    assert sample(logits_BV, [SamplingParams()] * 10, [0.99] * 10).tolist() == [1] * 10


def test_frequencies_are_the_probabilities():
    uniform = torch.linspace(0, 1, 10001, dtype=torch.float64)[:-1]
    counts = torch.bincount(sampled(uniform), minlength=4) / len(uniform)
    torch.testing.assert_close(counts, PROBABILITIES, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.01, {1}), (0.5, {1}), (0.51, {1, 3}), (0.8, {1, 3, 2})])
def test_nucleus_is_the_smallest_that_reaches_top_p(top_p, nucleus):
    uniform = torch.linspace(0, 1, 1001)[:-1]
    tokens = sampled(uniform, top_p=top_p)
    assert set(tokens.tolist()) == nucleus
    kept = torch.tensor([p if token in nucleus else 0.0 for token, p in enumerate(PROBABILITIES.tolist())])
    counts = torch.bincount(tokens, minlength=4) / len(uniform)
    torch.testing.assert_close(counts, kept / kept.sum(), atol=2e-3, rtol=0)


def warped(logits_V, sampling):
    """The probabilities that transformers' generate would draw from."""
    transformers = pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs

    warpers = [theirs.TemperatureLogitsWarper(float(sampling.temperature))]
    if sampling.top_k:
        warpers.append(theirs.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(theirs.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(theirs.MinPLogitsWarper(sampling.min_p))
    return transformers.LogitsProcessorList(warpers)(None, logits_V.unsqueeze(0))[0].softmax(-1)


@pytest.mark.parametrize("vocab_size", [5, 100, 2000])
@pytest.mark.parametrize("seed", range(3))
def test_every_setting_is_that_of_transformers_in_one_batch(seed, vocab_size):
    samplings = [SamplingParams(**{"temperature": 1.0, **changes}) for changes in SETTINGS]
    logits_BV = 3 * torch.randn(len(samplings), vocab_size, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack(
        [warped(logits_V, sampling) for logits_V, sampling in zip(logits_BV, samplings, strict=True)]
    )
    found = probabilities(logits_BV, samplings)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_penalty_is_that_of_transformers():
    theirs = pytest.importorskip("transformers.generation.logits_process")
    logits_BV = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    ids_BS = torch.randint(0, 40, (3, 15), generator=torch.Generator().manual_seed(1))
    penalties = [1.3, 0.7, 1.0]
    seen_BV = torch.zeros(3, 40, dtype=torch.bool).scatter(1, ids_BS, True)
    found = penalize(logits_BV, torch.tensor(penalties), seen_BV)
    for row, penalty in enumerate(penalties):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(ids_BS[row : row + 1], logits_BV[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], expected)


def test_equal_logits_at_the_border_of_top_k_all_stay():
    probability_BV = probabilities(torch.tensor([[1.0, 3.0, 1.0, 0.0]]), [SamplingParams(temperature=1.0, top_k=2)])
    assert (probability_BV[0] > 0).tolist() == [True, True, True, False]


def test_equal_probabilities_at_the_border_of_the_nucleus_all_stay():
    for size in (4, 1000):
        probability_BV = probabilities(torch.zeros(1, size), [SamplingParams(temperature=1.0, top_p=0.3)])
        assert (probability_BV > 0).all()


def test_a_token_of_no_probability_is_never_drawn():
    probability_BV = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]]).expand(4, -1)
    uniform_B = torch.tensor([0.0, 0.25, 1 - 2**-53, 1.0], dtype=torch.float64)
    assert draw(probability_BV, uniform_B).tolist() == [1, 3, 3, 3]


def test_the_lowest_temperature_is_greedy():
    logits_BV = torch.tensor([[1e4, -1e4, 1e4 - 1]])
    for temperature in (1e-300, 1e-30):
        assert sample(logits_BV, [SamplingParams(temperature=temperature)], [0.999]).tolist() == [0]


def test_rows_of_a_batch_do_not_touch_each_other():
    samplings = [SamplingParams(**{"temperature": 1.0, **changes}) for changes in SETTINGS] + [SamplingParams()]
    generator = torch.Generator().manual_seed(2)
    logits_BV = 2 * torch.randn(len(samplings), 600, generator=generator)
    uniforms = torch.rand(len(samplings), generator=generator).tolist()
    together = sample(logits_BV, samplings, uniforms).tolist()
    alone = [
        sample(logits_BV[row : row + 1], [samplings[row]], [uniforms[row]]).item() for row in range(len(samplings))
    ]
    assert together == alone
    assert together[-1] == logits_BV[-1].argmax()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("nan")},
        {"stop": ("a", "")},
        {"logprobs": -1},
        {"prompt_logprobs": True},
    ],
)
def test_values_outside_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*must be"):
        SamplingParams(**wrong)

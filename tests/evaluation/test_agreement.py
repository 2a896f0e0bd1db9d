"""When two paths agree: every clause of the rule, broken on its own."""

import math

import pytest
import torch

from megatron_dmc.evaluation.agreement import Agreement
from megatron_dmc.evaluation.scores import Scores
from megatron_dmc.support.errors import CheckFailed

L, S, B, G = 2, 10, 3, 2


def equal_scores():
    """The same scores twice."""
    torch.manual_seed(0)
    log_prob_SB = -torch.rand(S, B)
    logit_LSBG = torch.randn(L, S, B, G).sign()
    return [
        Scores(log_prob_SB.clone(), logit_LSBG.clone(), logit_LSBG > 0, torch.arange(S), torch.ones(L, G))
        for _ in ("whole", "decoded")
    ]


def decide(scores, index, logit, threshold=0.0):
    """The decision at ``index`` that follows from this logit."""
    scores.decision_logit_LSBG[index] = logit
    scores.alpha_LSBG[index] = logit > threshold


def decide_apart(whole, decoded, index, distance=0.5e-4):
    """Different decisions at ``index``, both as close to the threshold as ``distance``."""
    decide(whole, index, distance)
    decide(decoded, index, -distance)


def agreement_of(whole, decoded, asserted=True, **known):
    agreement = Agreement(asserted, **known)
    agreement.add(whole, decoded)
    return agreement


def test_equal_scores_agree():
    agreement = agreement_of(*equal_scores())
    agreement.require()
    assert agreement.num_tokens_compared == S * B
    assert agreement.num_cut == 0
    assert agreement.to_dict()["share_of_equal_decisions"] == 1.0


@pytest.mark.parametrize("difference", [2e-4, math.nan, math.inf])
def test_a_log_probability_that_differs(difference):
    whole, decoded = equal_scores()
    decoded.log_prob_SB[4, 1] += difference
    with pytest.raises(CheckFailed, match="log-probabilities differ by"):
        agreement_of(whole, decoded).require()


def test_small_differences_are_rounding():
    whole, decoded = equal_scores()
    decoded.log_prob_SB[:] += 0.9e-4
    agreement = agreement_of(whole, decoded)
    agreement.require()
    assert agreement.mean_log_prob_difference == pytest.approx(0.9e-4, rel=1e-2)


def test_a_decision_at_the_threshold_cuts_its_sequence():
    whole, decoded = equal_scores()
    decide_apart(whole, decoded, (1, 4, 1, 0))
    # What follows from the first difference counts no more: later decisions, later tokens.
    decide(whole, (0, 7, 1, 0), 3.0)
    decide(decoded, (0, 7, 1, 0), -3.0)
    decoded.log_prob_SB[4:, 1] += 1.0
    agreement = agreement_of(whole, decoded)
    agreement.require()
    assert agreement.num_cut == 1
    assert agreement.num_tokens_compared == S * B - (S - 4)
    assert agreement.num_equal_decisions == L * S * B * G - 2
    assert agreement.largest_logit_of_difference == pytest.approx(0.5e-4)


def test_a_consequence_in_a_higher_layer_is_no_failure_of_its_own():
    whole, decoded = equal_scores()
    decide_apart(whole, decoded, (0, 4, 1, 0))
    decide(whole, (1, 4, 1, 1), 3.0)
    decide(decoded, (1, 4, 1, 1), -3.0)
    agreement_of(whole, decoded).require()


def test_a_decision_far_from_the_threshold_fails():
    whole, decoded = equal_scores()
    decide(whole, (0, 9, 2, 1), 1.0)
    decide(decoded, (0, 9, 2, 1), -0.5e-4)
    with pytest.raises(CheckFailed, match=r"a decision differs whose logit is 1.00e\+00 from the threshold"):
        agreement_of(whole, decoded).require()


def test_distance_counts_from_the_models_own_threshold():
    for threshold, agrees in ((0.0078125, True), (0.0, False)):
        whole, decoded = equal_scores()
        decide(whole, (0, 4, 1, 0), 0.00782, threshold=0.0078125)
        decide(decoded, (0, 4, 1, 0), 0.00780, threshold=0.0078125)
        assert (agreement_of(whole, decoded, threshold=threshold).failures() == []) == agrees


def test_too_many_sequences_that_differ():
    whole, decoded = equal_scores()
    for row in (0, 2):
        decide_apart(whole, decoded, (0, 4, row, 0))
    with pytest.raises(CheckFailed, match=r"decisions differ in 2 of 3 sequences \(at most 1\)"):
        agreement_of(whole, decoded).require()
    assert agreement_of(whole, decoded, num_sequences=2000).failures() == []


def test_nothing_to_compare_is_a_failure():
    whole, decoded = equal_scores()
    for row in range(B):
        decide_apart(whole, decoded, (0, 0, row, 0))
    with pytest.raises(CheckFailed, match="no token could be compared"):
        agreement_of(whole, decoded).require()


def test_bfloat16_reports():
    whole, decoded = equal_scores()
    decoded.log_prob_SB[:] += 1.0
    decide(whole, (0, 9, 2, 1), 3.0)
    decide(decoded, (0, 9, 2, 1), -3.0)
    agreement = agreement_of(whole, decoded, asserted=False)
    agreement.require()
    assert agreement.to_dict()["share_of_equal_decisions"] == 1 - 1 / (L * S * B * G)

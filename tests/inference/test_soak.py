"""Hundreds of requests through a cache that is always full; ``examples/benchmarks/soak.py`` runs thousands."""

import pytest

from examples.benchmarks import soak


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_request_is_lost_and_no_text_changed(seed):
    outcome = soak.soak(num_requests=300, seed=seed)
    assert outcome.num_requests >= 300
    assert outcome.num_lost == outcome.num_different == outcome.num_blocks_left == 0
    assert outcome.num_ties <= 1
    assert outcome.num_preempted > 0
    assert outcome.num_cancelled > 0
    assert outcome.least_free_blocks < soak.NUM_BLOCKS / 10


def test_a_wrong_text_is_found():
    """The comparison can fail: where no tie explains it, another token is another text."""
    model = soak.Decoder(soak.RandomSource(soak.SHAPE, soak.DMCConfig(decision_bias=-0.7), seed=0))
    sampling = soak.SamplingParams(max_new_tokens=5)
    (request,) = soak.Engine(model, decode=soak.letters).generate([[1, 2, 3]], sampling)
    request.output[3] = (request.output[3] + 1) % soak.SHAPE.vocab_size
    outcome = soak.Outcome()
    soak.compare(model, [request], outcome)
    assert (outcome.num_different, outcome.num_ties) == (1, 0)

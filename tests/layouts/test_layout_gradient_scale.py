"""The gradient that travels with the hidden states is the one that autograd finds for LM loss + hinge."""

import numpy as np
import pytest

from tests.layouts import plain_autograd, probe
from tests.layouts.cases import PER_LAYER, PER_TOKEN, WHOLE_SEGMENT
from tests.layouts.laboratory import VOCAB_SIZE
from tests.layouts.whole_run import assemble, deviation

ROUNDING = 1e-6


@pytest.mark.parametrize(
    ("variant", "switches"),
    [
        (WHOLE_SEGMENT, ()),
        (WHOLE_SEGMENT, ("--dmc-loss-weight", "2.5", "--micro-batch-size", "8")),
        (WHOLE_SEGMENT, PER_TOKEN),
        (PER_LAYER, ()),
    ],
    ids=["four_microbatches", "weight_one_microbatch", "per_token_loss", "decisions_per_layer"],
)
def test_layout_gradient_is_that_of_plain_autograd(laboratory, variant, switches):
    base = laboratory.base(variant)
    argv = laboratory.arguments(variant, switches, train_iters=1, pretrained_checkpoint=base)
    plain_argv = [argument for argument in argv if argument not in PER_TOKEN]
    attached, plain = (
        assemble(laboratory.run(function, 1, arguments), VOCAB_SIZE)
        for function, arguments in ((probe.train, argv), (plain_autograd.train, plain_argv))
    )
    for name, expected in plain.gradients.items():
        assert deviation(attached.gradients[name], expected) <= ROUNDING, name


def test_layout_hinge_shapes_the_gradients(laboratory):
    """Without this the comparisons above would hold for a hinge that is never open."""
    weighted = laboratory.reference(WHOLE_SEGMENT, 1)
    unweighted = laboratory.train(WHOLE_SEGMENT, 1, ("--dmc-loss-weight", "0"), train_iters=1)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert deviation(unweighted.gradients[name], weighted.gradients[name]) > 1e-2
    assert np.linalg.norm(unweighted.gradients[name]) > 0

"""``retrofit`` starts with the rows of the borrowed channels at zero, wherever a copy of the weights is kept."""

import numpy as np
import pytest

from tests.layouts.cases import DISTRIBUTED_OPTIMIZER, LAYOUTS, RETROFIT
from tests.layouts.laboratory import NUM_LAYERS

HEADS_PER_GROUP, HEAD_DIM = 4, 16
"""Two query heads, one key head, one value head."""


def _borrowed_and_other_rows(run, layer):
    weight = run.weights[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
    heads = weight.reshape(-1, HEADS_PER_GROUP, HEAD_DIM, weight.shape[1])
    return heads[:, :-1, -1], heads[:, :, :-1]


@pytest.mark.parametrize(
    ("layout", "switches"),
    [
        ("tp2_pp2", ()),
        ("dp2", ("--bf16", *DISTRIBUTED_OPTIMIZER)),
        pytest.param("dp2", ("--bf16",), marks=pytest.mark.exhaustive),
        pytest.param("dp2", DISTRIBUTED_OPTIMIZER, marks=pytest.mark.exhaustive),
    ],
)
def test_layout_borrowed_rows_stay_zero(laboratory, layout, switches):
    """With learning rate 0 the optimizer writes its own copy of the weights back; an early copy would return."""
    where = LAYOUTS[layout]
    run = laboratory.train(RETROFIT, where.ranks, (*where.switches, *switches), train_iters=2, lr=0, min_lr=0)
    for layer in range(NUM_LAYERS):
        borrowed, others = _borrowed_and_other_rows(run, layer)
        assert not borrowed.any()
        assert np.count_nonzero(others) == others.size

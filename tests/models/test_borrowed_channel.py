"""What is cleared to make a plain model of one that lends channels."""

import dataclasses

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.borrowed_channel import borrowed_by, without_borrowed_channels
from megatron_dmc.ops.borrowed import EVERY_HEAD, FIRST_QUERY, NO_HEAD
from tests.checkpoints_convert.models import TINY


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (None, NO_HEAD),
        (DMCConfig(stage="off"), NO_HEAD),
        (DMCConfig(stage="zero_out"), EVERY_HEAD),
        (DMCConfig(decisions_per="layer"), EVERY_HEAD),
        (DMCConfig("dms", "zero_out"), FIRST_QUERY),
        (DMCConfig("dms"), FIRST_QUERY),
        (DMCConfig("dms", decision_source="adapter"), NO_HEAD),
    ],
)
def test_who_lends(settings, expected):
    assert borrowed_by(settings) == expected


@pytest.mark.parametrize(("role", "heads"), [("q", 4), ("k", 2), ("v", 2), ("gate", 3)])
@pytest.mark.parametrize("borrowed", [EVERY_HEAD, FIRST_QUERY, NO_HEAD])
def test_rows_of_the_heads_that_lend(borrowed, role, heads):
    weight = torch.ones(heads * TINY.head_dim, 5)
    cleared = without_borrowed_channels(role, weight, TINY, borrowed)
    lending = {EVERY_HEAD: {"q": [0, 1, 2, 3], "k": [0, 1]}, FIRST_QUERY: {"q": [0, 2]}, NO_HEAD: {}}[borrowed]
    rows = [head * TINY.head_dim + TINY.head_dim - 1 for head in lending.get(role, [])]
    assert (cleared == 0).all(dim=1).nonzero().flatten().tolist() == rows
    assert (cleared[[row for row in range(len(cleared)) if row not in rows]] == 1).all()
    assert (weight == 1).all()


def test_heads_that_share_a_norm_lend_together_or_not_at_all():
    config, weight = dataclasses.replace(TINY, qk_norm=True), torch.ones(TINY.head_dim)
    assert without_borrowed_channels("q_norm", weight, config, EVERY_HEAD).tolist() == [1.0] * 15 + [0.0]
    assert torch.equal(without_borrowed_channels("q_norm", weight, config, NO_HEAD), weight)
    with pytest.raises(ValueError, match="there is no plain model without it"):
        without_borrowed_channels("q_norm", weight, config, FIRST_QUERY)

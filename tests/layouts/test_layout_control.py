"""Megatron's own model in the same layouts: what rounding alone does, the measure of our tolerances."""

import pytest

from tests.layouts.agreement import compare
from tests.layouts.cases import LAYOUTS, CONTROL

STEPS = 20

NEEDS_TRANSFORMER_ENGINE = ("cp", "sp")
"""Parts of layout names: Megatron's local attention refuses context parallelism, its local RMSNorm sequence
parallelism. Both are controlled only where Transformer Engine is installed."""

CONTROLLED = [name for name in LAYOUTS if not any(part in name for part in NEEDS_TRANSFORMER_ENGINE)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", CONTROLLED)
def test_layout_control(laboratory, layout):
    where = LAYOUTS[layout]
    run = laboratory.train(CONTROL, where.ranks, where.switches, train_iters=STEPS)
    print(compare(run, laboratory.reference(CONTROL, STEPS)))

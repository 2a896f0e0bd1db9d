"""bfloat16: where a layout changes no sum nothing changes, elsewhere as much as 8 bits allow."""

import numpy as np
import pytest

from tests.layouts.agreement import compare
from tests.layouts.cases import ADAPTER, BFLOAT16, DISTILLED, LAYOUTS, WHOLE_SEGMENT

STEPS = 3

LOSS = 0.02
"""Absolute, of an LM loss of 5: 2**-8 of it."""


def test_layout_bfloat16_agrees_with_float32(laboratory):
    half, full = laboratory.reference(BFLOAT16, STEPS), laboratory.reference(WHOLE_SEGMENT, STEPS)
    agreement = compare(half, full)
    print(agreement)
    assert 0 < agreement.curve <= LOSS


def test_layout_bfloat16_counts_survive_the_pipeline(laboratory):
    """Pipeline stages change no sum: the counts and gates that travel in a bfloat16 row are exact."""
    where = LAYOUTS["pp2_vp2"]
    run = laboratory.train(BFLOAT16, where.ranks, where.switches, train_iters=STEPS)
    alone = laboratory.reference(BFLOAT16, STEPS)
    np.testing.assert_array_equal(run.curve("compression loss"), alone.curve("compression loss"))
    np.testing.assert_allclose(run.curve("lm loss"), alone.curve("lm loss"), rtol=1e-6)
    for name, expected in alone.gradients.items():
        np.testing.assert_array_equal(run.gradients[name], expected, err_msg=name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["tp2_sp_pp2", "cp2_pp2", "dp2_tp2_distributed_optimizer", "recompute_selective"])
def test_layout_bfloat16_agrees(laboratory, layout):
    """A layout moves the gradients less than bfloat16 itself moves them on one rank."""
    where = LAYOUTS[layout]
    run = laboratory.train(BFLOAT16, where.ranks, where.switches, train_iters=STEPS)
    alone, full = laboratory.reference(BFLOAT16, STEPS), laboratory.reference(WHOLE_SEGMENT, STEPS)
    agreement = compare(run, alone)
    print(agreement)
    assert agreement.curve <= LOSS
    assert agreement.gradient <= compare(alone, full).gradient


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", [DISTILLED, ADAPTER], ids=["frozen_teacher", "adapters"])
@pytest.mark.parametrize("layout", ["tp2_sp_pp2", "dp2_tp2_distributed_optimizer"])
def test_layout_bfloat16_with_a_teacher(laboratory, variant, layout):
    where = LAYOUTS[layout]
    half = laboratory.train(variant, where.ranks, (*where.switches, "--bf16"), train_iters=STEPS)
    assert 0 < compare(half, laboratory.reference(variant, STEPS)).curve <= LOSS

"""Validation takes hard decisions, in every layout the same, and leaves the training that goes on alone."""

import pytest

from tests.layouts.agreement import assert_agree
from tests.layouts.cases import LAYOUTS, WHOLE_SEGMENT

FLAGS = {"train_iters": 4, "split": "70,30,0", "eval_iters": 2, "eval_global_batch_size": 4, "eval_micro_batch_size": 1}


@pytest.mark.parametrize("layout", ["tp2_sp_pp2_vp2", pytest.param("cp2_tp2", marks=pytest.mark.exhaustive)])
def test_layout_validation(laboratory, layout):
    where = LAYOUTS[layout]
    alone = laboratory.train(WHOLE_SEGMENT, 1, eval_interval=2, watched=2, **FLAGS)
    shared = laboratory.train(WHOLE_SEGMENT, where.ranks, where.switches, eval_interval=2, watched=2, **FLAGS)
    assert len(alone.validations) == len(shared.validations) >= 2
    for mine, expected in zip(shared.validations, alone.validations, strict=True):
        assert mine == pytest.approx(expected, rel=1e-6)
    assert_agree(shared, alone)


def test_layout_validation_does_not_shift_the_noise(laboratory):
    without = laboratory.train(WHOLE_SEGMENT, 1, eval_interval=1000, watched=2, **FLAGS | {"eval_iters": 0})
    validated = laboratory.train(WHOLE_SEGMENT, 1, eval_interval=2, watched=2, **FLAGS)
    assert_agree(validated, without)

"""N + M steps are one run, in the same layout and in another: weights, optimizer, noise and data go on."""

import pytest

from tests.layouts.agreement import assert_agree
from tests.layouts.cases import (
    ADAPTER,
    CONTEXT,
    DISTILLED,
    DISTRIBUTED_OPTIMIZER,
    OVERLAP,
    PIPELINE,
    TENSOR,
    WHOLE_SEGMENT,
    Layout,
)
from tests.layouts.whole_run import deviation

STEPS, SAVED = 6, 3

WEIGHTS = 1e-6
"""Relative to the weights: after a resume the optimizer goes on, while a lost state moves them by 1e-4."""

RESHARDABLE = (*DISTRIBUTED_OPTIMIZER, "--dist-ckpt-optim-fully-reshardable")

ALONE = Layout(1)
QUICK = {
    "one_rank_to_tp2_pp2": (WHOLE_SEGMENT, ALONE, Layout(4, (*TENSOR, *PIPELINE))),
    "dp2_reshardable_to_tp2": (WHOLE_SEGMENT, Layout(2, RESHARDABLE), Layout(2, (*RESHARDABLE, *TENSOR))),
    "adapters_dp2_reshardable_to_pp2": (ADAPTER, Layout(2, RESHARDABLE), Layout(2, (*RESHARDABLE, *PIPELINE))),
}
SLOW = {
    "one_rank": (WHOLE_SEGMENT, ALONE, ALONE),
    "tp2_pp2_to_cp2": (WHOLE_SEGMENT, Layout(4, (*TENSOR, *PIPELINE)), Layout(2, CONTEXT)),
    "dp2_distributed_optimizer": (WHOLE_SEGMENT, Layout(2, OVERLAP), Layout(2, OVERLAP)),
    "dp2_pp2_distributed_optimizer": (
        WHOLE_SEGMENT,
        Layout(4, (*OVERLAP, *PIPELINE)),
        Layout(4, (*OVERLAP, *PIPELINE)),
    ),
    "dp2_pp2_reshardable_to_one_rank": (WHOLE_SEGMENT, Layout(4, (*RESHARDABLE, *PIPELINE)), Layout(1, RESHARDABLE)),
    "distilled_tp2_to_pp2": (DISTILLED, Layout(2, TENSOR), Layout(2, PIPELINE)),
    "adapters_one_rank_to_tp2": (ADAPTER, ALONE, Layout(2, TENSOR)),
    "adapters_dp2_pp2_distributed_optimizer": (
        ADAPTER,
        Layout(4, (*OVERLAP, *PIPELINE)),
        Layout(4, (*OVERLAP, *PIPELINE)),
    ),
}


@pytest.mark.parametrize("change", [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in SLOW)])
def test_layout_resume(laboratory, change):
    variant, before, after = (QUICK | SLOW)[change]
    save = laboratory.path(f"resume_{change}")
    # Without the samples of a whole recipe the order of the data must come from the checkpoint.
    flags = {"train_iters": STEPS, "dmc_total_samples": None}
    whole = laboratory.train(variant, 1, watched=SAVED, **flags)
    laboratory.train(variant, before.ranks, before.switches, exit_interval=SAVED, save=save, **flags)
    resumed = laboratory.train(variant, after.ranks, after.switches, save=save, **flags)
    assert len(resumed.steps) == STEPS - SAVED
    whole.steps = whole.steps[SAVED:]
    assert_agree(resumed, whole)
    for name, expected in whole.weights.items():
        assert deviation(resumed.weights[name], expected) <= WEIGHTS, name

"""The same losses, gradients and decisions in every layout as on one rank.

``make test`` runs a choice that covers each mechanism. The whole matrix is marked exhaustive: every layout for 20
steps, and the other models and stages for a few.
"""

import pytest

from tests.layouts.agreement import assert_agree, assert_telling
from tests.layouts.cases import (
    ADAPTER,
    ADAPTER_FROM_PLAIN,
    ADAPTER_WITH_ALL,
    DISTILLED,
    DISTILLED_TIED,
    DISTILLED_ZERO_OUT,
    DMS,
    DOCUMENTS,
    LAYOUTS,
    MULTI_HEAD,
    MULTI_QUERY,
    PER_LAYER,
    RETROFIT,
    TIED,
    WHOLE_SEGMENT,
    WINDOW,
    ZERO_OUT,
    ZERO_OUT_DOCUMENTS,
)

FEW_STEPS = 3
STEPS = 20

QUICK = {
    "recompute_uniform_tp2_sp_pp2": WHOLE_SEGMENT,
    "pp2_vp2": WINDOW,
    "cp2_tp2_sp": PER_LAYER,
    "dp2_distributed_optimizer_overlap": WHOLE_SEGMENT,
    "cp2_pp2": DOCUMENTS,
    "per_token_loss_cp2_pp2": WHOLE_SEGMENT,
    "tp2_sp_pp2_vp2": DISTILLED,
    "cp2_tp2": DMS,
    "recompute_uniform_pp2_vp2": ADAPTER,
    "dp2_tp2_distributed_optimizer": ADAPTER,
}

MODELS = {
    "multi_head": (MULTI_HEAD, ("tp2_sp_pp2", "cp2")),
    "multi_query": (MULTI_QUERY, ("pp2_vp2", "cp2_pp2")),
    "tied_embeddings": (TIED, ("tp2_sp_pp2", "dp2_pp2")),
    "window": (WINDOW, ("tp2_sp_pp2", "cp2_pp2", "recompute_block")),
    "decisions_per_layer": (PER_LAYER, ("tp2", "tp2_sp_pp2", "cp2_tp2", "dp2_pp2")),
    "distilled": (
        DISTILLED,
        ("pp4", "cp2_pp2", "dp2_tp2_distributed_optimizer", "recompute_block", "per_token_loss_tp2_sp"),
    ),
    "distilled_tied": (DISTILLED_TIED, ("tp2_sp_pp2", "pp2_vp2")),
    "dms": (DMS, ("tp2_sp_pp2", "cp2_pp2", "recompute_selective", "per_token_loss_dp2_pp2", "dp2")),
    "adapter": (
        ADAPTER,
        ("tp2_sp_pp2_vp2", "cp2_tp2_sp", "recompute_selective_pp2", "recompute_block", "pp4", "per_token_loss"),
    ),
    "adapter_with_all": (ADAPTER_WITH_ALL, ("tp2_sp_pp2", "cp2_tp2_sp", "recompute_uniform_pp2_vp2", "dp2")),
    "documents": (DOCUMENTS, ("pp2", "cp2", "cp2_pp2", "tp2_sp_pp2", "pp2_vp2", "dp2", "recompute_uniform")),
}


@pytest.mark.parametrize("layout", QUICK)
def test_layout_agrees(laboratory, layout):
    variant, where = QUICK[layout], LAYOUTS[layout]
    run = laboratory.train(variant, where.ranks, where.switches, train_iters=FEW_STEPS)
    reference = laboratory.reference(variant, FEW_STEPS)
    assert_telling(reference, variant.target_cr)
    assert_agree(run, reference)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_agrees_for_20_steps(laboratory, layout):
    where = LAYOUTS[layout]
    run = laboratory.train(WHOLE_SEGMENT, where.ranks, where.switches, train_iters=STEPS)
    reference = laboratory.reference(WHOLE_SEGMENT, STEPS)
    assert_telling(reference, WHOLE_SEGMENT.target_cr)
    assert_agree(run, reference)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "layout"), [(model, layout) for model in MODELS for layout in MODELS[model][1]])
def test_layout_agrees_for_every_model(laboratory, model, layout):
    variant, where = MODELS[model][0], LAYOUTS[layout]
    run = laboratory.train(variant, where.ranks, where.switches, train_iters=FEW_STEPS)
    reference = laboratory.reference(variant, FEW_STEPS)
    assert_telling(reference, variant.target_cr)
    assert_agree(run, reference)


def test_layout_agrees_in_zero_out(laboratory):
    where = LAYOUTS["cp2_tp2_sp"]
    run = laboratory.train(ZERO_OUT, where.ranks, where.switches, train_iters=FEW_STEPS)
    assert_agree(run, laboratory.reference(ZERO_OUT, FEW_STEPS))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "variant",
    [ZERO_OUT, ZERO_OUT_DOCUMENTS, RETROFIT, DISTILLED_ZERO_OUT, ADAPTER_FROM_PLAIN],
    ids=["zero_out", "documents", "retrofit", "distilled", "adapter"],
)
@pytest.mark.parametrize("layout", ["tp2_sp_pp2_vp2", "cp2_pp2", "dp2_distributed_optimizer", "recompute_uniform"])
def test_layout_agrees_in_other_stages(laboratory, variant, layout):
    where = LAYOUTS[layout]
    run = laboratory.train(variant, where.ranks, where.switches, train_iters=FEW_STEPS)
    assert_agree(run, laboratory.reference(variant, FEW_STEPS))

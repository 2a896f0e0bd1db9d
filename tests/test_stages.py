"""Stages follow each other in one order, and what changes during one is a pure function of the step."""

import dataclasses

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.stages import (
    CONSOLIDATE,
    OFF,
    RETROFIT,
    STAGES,
    ZERO_OUT,
    Stage,
    accumulate_fraction,
    find_stage,
    register,
    retrofit_order,
)

ORDER = ["off", "zero_out", "retrofit", "consolidate"]


@pytest.mark.parametrize("before", ORDER)
@pytest.mark.parametrize("stage", ORDER[1:])
def test_a_stage_starts_only_from_the_one_before_it(stage, before):
    if ORDER.index(before) == ORDER.index(stage) - 1:
        find_stage(stage).check_base(find_stage(before), "BASE")
    else:
        with pytest.raises(ValueError, match=f"{stage} was started from BASE, a checkpoint of stage {before}"):
            find_stage(stage).check_base(find_stage(before), "BASE")


def test_only_retrofit_clears_the_borrowed_rows():
    pairs = [(stage, find_stage(before)) for stage in STAGES.values() for before in stage.follows]
    assert [stage for stage, before in pairs if stage.clears_rows(before)] == [RETROFIT]


def test_no_stage_frees_a_channel_for_an_adapter():
    RETROFIT.check_base(OFF, "BASE", borrows_channel=False)
    CONSOLIDATE.check_base(RETROFIT, "BASE", borrows_channel=False)
    assert retrofit_order(borrows_channel=False) == ("retrofit", "consolidate")
    with pytest.raises(ValueError, match="it starts from off; run the stages in the order retrofit, consolidate"):
        RETROFIT.check_base(ZERO_OUT, "BASE", borrows_channel=False)
    with pytest.raises(ValueError, match="dmc_stage='zero_out': must be retrofit with an adapter"):
        DMCConfig("dms", "zero_out", decision_source="adapter")


def test_an_unknown_stage_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="dmc_stage='anneal': must be one of off, zero_out, retrofit, consolidate"):
        DMCConfig(stage="anneal")


def test_a_registered_stage_is_known_everywhere(monkeypatch):
    monkeypatch.setattr("megatron_dmc.stages.STAGES", STAGES.copy())
    register(Stage("hold", follows=("consolidate",), compresses=True))
    assert DMCConfig(stage="hold").compresses
    assert retrofit_order()[-1] == "hold"
    with pytest.raises(ValueError, match="in the order zero_out, retrofit, consolidate, hold"):
        find_stage("hold").check_base(ZERO_OUT, "BASE")


def test_retrofit_climbs_in_a_line_to_its_target():
    ratios = [RETROFIT.target_cr(step, 6, 4.0) for step in range(6)]
    assert ratios == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5, 4.0])


def test_retrofit_stays_at_its_target_when_it_runs_on():
    assert RETROFIT.target_cr(10, 6, 4.0) == 4.0


@pytest.mark.parametrize("stage", [OFF, ZERO_OUT])
def test_no_compression_is_asked_for_before_retrofit(stage):
    assert stage.target_cr(3, 6, 4.0) == 1.0


def test_consolidate_keeps_the_final_ratio():
    assert {CONSOLIDATE.target_cr(step, 6, 4.0) for step in range(6)} == {4.0}


@pytest.mark.parametrize(("ratio", "fraction"), [(1.0, 0.0), (2.0, 0.5), (4.0, 0.75), (8.0, 0.875)])
def test_accumulate_fraction(ratio, fraction):
    assert accumulate_fraction(ratio) == fraction


def test_neuron_fades_within_its_share_of_the_steps():
    scales = [ZERO_OUT.neuron_scale(step, 10, 0.8) for step in range(10)]
    assert scales == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0])
    assert {stage.neuron_scale(0, 10, 0.8) for stage in (RETROFIT, CONSOLIDATE)} == {0.0}


def test_the_published_learning_rates_become_flags():
    assert DMCConfig(stage="off").published.learning_rate is None
    assert DMCConfig().published.learning_rate.flags() == {"--lr": "3e-05", "--lr-decay-style": "constant"}
    assert DMCConfig(stage="consolidate").published.learning_rate.flags()["--min-lr"] == "3e-06"
    assert DMCConfig("dms").published.learning_rate.flags()["--lr"] == "1e-05"
    assert DMCConfig("dms", decision_source="adapter").published.learning_rate.flags()["--lr"] == "3e-05"


@pytest.mark.parametrize(("steps_per_unit", "expected"), [(None, [1.5, 2.0, 2.5, 3.0]), (1, [2.0, 3.0, 3.0, 3.0])])
def test_the_ratio_rises_over_the_stage_or_by_its_own_steps(steps_per_unit, expected):
    settings = DMCConfig(target_cr=3.0, steps_per_unit=steps_per_unit)
    ramp = settings.ramp_steps(4)
    assert [RETROFIT.target_cr(step, ramp, 3.0) for step in range(4)] == pytest.approx(expected)


def test_a_ramp_to_nothing_has_an_end():
    assert RETROFIT.target_cr(0, DMCConfig(target_cr=1.0, steps_per_unit=100).ramp_steps(4), 1.0) == 1.0


def test_a_stage_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RETROFIT.compresses = False

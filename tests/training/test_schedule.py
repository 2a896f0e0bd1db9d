"""The schedule is a pure function of the step."""

import pytest

from megatron_dmc.training.schedule import accumulate_fraction, neuron_scale, target_cr


def test_retrofit_climbs_in_a_line_to_its_target():
    ratios = [target_cr("retrofit", step, 6, 4.0) for step in range(6)]
    assert ratios == pytest.approx([1.5, 2.0, 2.5, 3.0, 3.5, 4.0])


def test_retrofit_stays_at_its_target_when_it_runs_on():
    assert target_cr("retrofit", 10, 6, 4.0) == 4.0


@pytest.mark.parametrize("stage", ["off", "zero_out"])
def test_no_compression_is_asked_for_before_retrofit(stage):
    assert target_cr(stage, 3, 6, 4.0) == 1.0


def test_consolidate_keeps_the_final_ratio():
    assert {target_cr("consolidate", step, 6, 4.0) for step in range(6)} == {4.0}


@pytest.mark.parametrize(("ratio", "fraction"), [(1.0, 0.0), (2.0, 0.5), (4.0, 0.75), (8.0, 0.875)])
def test_accumulate_fraction(ratio, fraction):
    assert accumulate_fraction(ratio) == fraction


def test_neuron_fades_within_its_share_of_the_steps():
    scales = [neuron_scale(step, 10, 0.8) for step in range(10)]
    assert scales == pytest.approx([1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0, 0])

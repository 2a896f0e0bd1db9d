"""Recipes: control and retrofit read the same sequences, and no sequence is read twice."""

import dataclasses

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.recipes.recipe import SMALL, Recipe, Training, flags, user_model_recipe

STAGES = list(SMALL.stages)


def parsed(arguments):
    return dict(zip(arguments[::2], arguments[1::2], strict=True))


def test_stages_follow_one_another_in_the_data():
    end = 0
    for stage in STAGES:
        assert SMALL.first_sample(stage) == end
        end += SMALL.stage(stage).steps * SMALL.stage(stage).batch_size
    assert SMALL.total_samples == end


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_control_differs_in_its_stage_alone(stage):
    ours, control = parsed(flags(SMALL, stage)), parsed(flags(SMALL, stage, control=True))
    assert ours.pop("--dmc-stage") == stage
    assert control.pop("--dmc-stage") == "off"
    assert ours == control


def test_the_base_is_not_compressed():
    assert parsed(flags(SMALL, "base"))["--dmc-stage"] == "off"


def test_every_setting_of_dmc_is_passed_on():
    recipe = dataclasses.replace(SMALL, dmc=DMCConfig(target_cr=2.5, window_size=12, loss_weight=3.0))
    given = parsed(flags(recipe, "retrofit"))
    assert given["--dmc-target-cr"] == "2.5"
    assert given["--dmc-window-size"] == "12"
    assert given["--dmc-loss-weight"] == "3.0"
    assert "--dmc-stop-at-cr" not in given


def test_decisions_are_softer_only_while_the_target_rises():
    temperatures = {stage: parsed(flags(SMALL, stage))["--dmc-temperature"] for stage in STAGES[1:]}
    assert temperatures == {"zero_out": "0.1", "retrofit": "0.6", "consolidate": "0.1"}
    assert parsed(flags(user_model_recipe(), "retrofit"))["--dmc-temperature"] == "0.1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": {**SMALL.stages, "retrofit": Training(0, 1e-4, 1e-4)}}, "retrofit of 0 steps"),
        ({"seq_length": 0}, "seq_length=0"),
        ({"micro_batch_size": 3}, "micro_batch_size=3: must divide the global batch of 2 in zero_out"),
    ],
)
def test_recipes_that_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_a_users_model_gets_the_published_rates_and_no_base_training():
    recipe = user_model_recipe()
    assert recipe.first_sample("zero_out") == 0
    assert {recipe.stage(stage).learning_rate for stage in STAGES[1:]} == {3e-5}
    assert recipe.stage("consolidate").min_learning_rate == 3e-6


def test_one_batch_size_for_every_stage():
    recipe = SMALL.with_batch_size(8)
    assert {recipe.stage(stage).batch_size for stage in STAGES} == {8}
    assert parsed(flags(recipe, "base"))["--micro-batch-size"] == "8"


def test_other_lengths_keep_the_rest():
    short = SMALL.stage("base").of_length(4)
    assert (short.steps, short.learning_rate) == (4, SMALL.stage("base").learning_rate)
    assert short.warmup_steps <= 2
    assert Recipe() == SMALL

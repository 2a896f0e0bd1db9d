"""A stage goes on with another length where its learning rate does not depend on it."""

import pytest

from megatron_dmc.training.lengthening import OVERRIDE, lengthening

SAVED = {
    "train_iters": 2,
    "lr": 3e-5,
    "min_lr": 0.0,
    "lr_decay_style": "constant",
    "lr_decay_iters": 2,
    "lr_warmup_iters": 0,
    "lr_warmup_fraction": None,
    "weight_decay": 0.1,
    "weight_decay_incr_style": "constant",
    "global_batch_size": 16,
}
USUAL = ["--lr", "3e-5", "--lr-decay-style", "constant", "--weight-decay", "0.1", "--global-batch-size", "16"]


def test_a_run_that_begins_and_one_of_the_same_length_are_left_alone():
    assert lengthening([*USUAL, "--train-iters", "4"], {}).flags == []
    same = lengthening([*USUAL, "--train-iters", "2"], SAVED)
    assert (same.flags, same.remark) == ([], None)


@pytest.mark.parametrize("length", ["4", "1"])
def test_another_length_at_a_constant_rate(length):
    other = lengthening([*USUAL, "--train-iters", length], SAVED)
    assert other.flags == [OVERRIDE]
    assert f"began with --train-iters 2: what rises or fades over it is stretched over {length} steps" in other.remark
    assert "the data may come in another order" in other.remark
    ordered = lengthening([*USUAL, "--train-iters", length, "--dmc-total-samples", "99"], SAVED)
    assert "another order" not in ordered.remark


@pytest.mark.parametrize(("stage", "goes_on"), [("retrofit", True), ("zero_out", False)])
def test_a_target_with_a_pace_of_its_own_is_not_stretched(stage, goes_on):
    saved = SAVED | {"dmc_steps_per_unit": 100.0, "dmc_stage": stage}
    remark = lengthening([*USUAL, "--train-iters", "4"], saved).remark
    assert ("at the pace of --dmc-steps-per-unit" in remark) == goes_on
    assert ("stretched over 4 steps" in remark) != goes_on


def test_a_falling_rate_is_for_the_user_to_decide():
    falling = [*USUAL, "--lr-decay-style", "cosine", "--train-iters", "4"]
    saved = SAVED | {"lr_decay_style": "cosine"}
    with pytest.raises(ValueError, match=r"falls \(cosine\); give --override-opt_param.* --lr-decay-iters 2"):
        lengthening(falling, saved)
    assert lengthening([*falling, "--lr-decay-iters", "2"], saved).flags == [OVERRIDE]
    for decision in (OVERRIDE, "--override-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"):
        assert lengthening([*falling, decision], saved).flags == []


@pytest.mark.parametrize("other", [["--lr", "1"], ["--lr-warmup-iters", "1"], ["--weight-decay", "0.2"]])
def test_what_else_differs_is_not_overridden(other):
    assert lengthening([*USUAL, "--train-iters", "4", *other], SAVED).flags == []

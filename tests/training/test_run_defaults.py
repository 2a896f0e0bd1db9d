"""Usual values of what every run needs, and the one thing that is asked for."""

import pytest

from megatron_dmc.recipes.recipe import SMALL_LLAMA
from megatron_dmc.stages import CONSOLIDATE, OFF, RETROFIT, STAGES, ZERO_OUT, ZERO_OUT_STEPS
from megatron_dmc.training.flag_parser import FlagParser
from megatron_dmc.training.run_defaults import add_run_arguments, run_flags, short_stage


def flags(*argv, config=SMALL_LLAMA, stage=ZERO_OUT, ranks=1):
    parser = FlagParser()
    parser.add_argument("--save")
    parser.add_argument("--dmc-target-cr", type=float)
    add_run_arguments(parser)
    return run_flags(parser.parse_known_args(argv)[0], config, stage, {"WORLD_SIZE": str(ranks)})


def test_a_length_is_enough():
    assert flags("--train-iters", "250", "--save", "run") == {
        "--micro-batch-size": "1",
        "--global-batch-size": "16",
        "--seq-length": "1024",
        "--save-interval": "500",
    }


@pytest.mark.parametrize(
    ("argv", "ranks", "size"),
    [
        ((), 32, 32),
        (("--micro-batch-size", "3"), 2, 18),
        (("--tensor-model-parallel-size", "4", "--context-parallel-size", "2"), 32, 16),
        (("--pipeline-model-parallel-size", "8"), 1, 16),
    ],
)
def test_the_global_batch_suits_the_ranks(argv, ranks, size):
    assert flags("--train-iters", "1", *argv, ranks=ranks)["--global-batch-size"] == str(size)


def test_a_schedule_of_batch_sizes_stays_alone():
    assert "--global-batch-size" not in flags("--train-iters", "1", "--step-batch-size-schedule", "0:8")


@pytest.mark.parametrize(
    ("stage", "published"), [(ZERO_OUT, ": 250"), (RETROFIT, ": 18,000"), (CONSOLIDATE, ": 2,000"), (OFF, "in steps$")]
)
def test_the_length_is_asked_for_with_the_published_one(stage, published):
    with pytest.raises(ValueError, match=f"--train-iters is missing.*{published}"):
        flags("--dmc-target-cr", "4", stage=stage)


@pytest.mark.parametrize("flag", ["--micro-batch-size", "--train-iters", "--context-parallel-size", "--save-interval"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_count_that_cannot_be_is_named(flag, value):
    with pytest.raises(ValueError, match=flag):
        flags("--train-iters", "5", flag, value)


def test_a_short_stage_is_warned_of():
    assert "five steps raised the perplexity" in short_stage(ZERO_OUT, ZERO_OUT_STEPS - 1)
    assert short_stage(ZERO_OUT, ZERO_OUT_STEPS) is None
    assert [short_stage(stage, 1) for stage in STAGES.values() if stage is not ZERO_OUT] == [None] * (len(STAGES) - 1)

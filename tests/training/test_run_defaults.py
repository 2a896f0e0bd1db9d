"""Usual values of what every run needs, and the one thing that is asked for."""

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.recipes.recipe import SMALL_LLAMA
from megatron_dmc.stages import STAGES, ZERO_OUT_STEPS
from megatron_dmc.training.flag_parser import FlagParser
from megatron_dmc.training.run_defaults import add_run_arguments, run_flags, short_stage


def flags(*argv, config=SMALL_LLAMA, ranks=1, **settings):
    parser = FlagParser()
    parser.add_argument("--save")
    add_run_arguments(parser)
    settings = DMCConfig(**{"stage": "zero_out"} | settings)
    return run_flags(parser.parse_known_args(argv)[0], config, settings, {"WORLD_SIZE": str(ranks)})


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
    ("settings", "published"),
    [
        ({"stage": "zero_out"}, ": 250"),
        ({"stage": "retrofit"}, ": 18,000"),
        ({"stage": "consolidate"}, ": 2,000"),
        ({"stage": "off"}, "in steps$"),
        ({"stage": "zero_out", "method": "dms"}, ": 2,000"),
        ({"stage": "retrofit", "method": "dms"}, ": 300"),
        ({"stage": "retrofit", "method": "dms", "decision_source": "adapter"}, ": 102"),
    ],
)
def test_the_length_is_asked_for_with_the_published_one(settings, published):
    with pytest.raises(ValueError, match=f"--train-iters is missing.*{published}"):
        flags(target_cr=4.0, **settings)


@pytest.mark.parametrize("flag", ["--micro-batch-size", "--train-iters", "--context-parallel-size", "--save-interval"])
@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_a_count_that_cannot_be_is_named(flag, value):
    with pytest.raises(ValueError, match=flag):
        flags("--train-iters", "5", flag, value)


def test_a_short_stage_is_warned_of():
    zero_out = DMCConfig(stage="zero_out")
    assert "five steps raised the perplexity" in short_stage(zero_out, ZERO_OUT_STEPS - 1)
    assert short_stage(zero_out, ZERO_OUT_STEPS) is None
    assert all(short_stage(DMCConfig(stage=name), 1) is None for name in STAGES if name != zero_out.stage)

"""Flags of a run that Megatron asks for with an empty reason, or sets to what no retrofit needs.

What is left out is set to a usual value, which is printed; the length of a stage alone is asked for.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

from megatron_dmc.config import DMS, DMCConfig
from megatron_dmc.models.config import ModelConfig

SEQUENCE_LENGTH = 4096
"""Of a model that reads as much: [DMC] section 4."""
GLOBAL_BATCH_SIZE = 16
"""At least; a step of fewer sequences follows its own noise. The published one is 1,024."""
SAVE_INTERVAL = 500

_COUNTS = (
    "--train-iters",
    "--train-samples",
    "--seq-length",
    "--micro-batch-size",
    "--global-batch-size",
    "--save-interval",
    "--tensor-model-parallel-size",
    "--pipeline-model-parallel-size",
    "--context-parallel-size",
)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's flags that say how long and how large a run is."""
    for flag in _COUNTS:
        parser.add_argument(flag, type=int)
    parser.add_argument("--step-batch-size-schedule")
    parser.add_argument("--skip-train", action="store_true")


def run_flags(
    given: argparse.Namespace, config: ModelConfig | None, settings: DMCConfig, environment: Mapping[str, str]
) -> dict[str, str | None]:
    """Usual values of what every run needs.

    Args:
        given: what :func:`add_run_arguments` has parsed, and ``save``.
        config: of the model; None where Megatron's flags describe it.
        settings: of the run.
        environment: with the number of ranks, ``WORLD_SIZE``.

    Raises:
        ValueError: a count below 1, or a stage without a length.
    """
    for flag in _COUNTS:
        value = getattr(given, flag[2:].replace("-", "_"))
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if given.train_iters is None and given.train_samples is None and not given.skip_train:
        raise ValueError(f"--train-iters is missing: the length of the stage in steps{_published(settings)}")
    micro = given.micro_batch_size or 1
    flags: dict[str, str | None] = {"--micro-batch-size": str(micro)}
    if given.step_batch_size_schedule is None:
        together = micro * _data_parallel_size(given, int(environment.get("WORLD_SIZE", "1")))
        flags["--global-batch-size"] = str(together * math.ceil(GLOBAL_BATCH_SIZE / together))
    if config is not None:
        flags["--seq-length"] = str(min(SEQUENCE_LENGTH, config.max_position_embeddings))
    if given.save:
        flags["--save-interval"] = str(SAVE_INTERVAL)
    return flags


def _published(settings: DMCConfig) -> str:
    steps = settings.published.steps
    return "" if steps is None else f" (published for {settings.stage}: {steps(settings.target_cr):,})"


def check_window(settings: DMCConfig, given: argparse.Namespace, config: ModelConfig | None) -> None:
    """Raise ``ValueError`` where no token of a training sequence ever leaves the window behind which DMS evicts."""
    length = given.seq_length or (config and min(SEQUENCE_LENGTH, config.max_position_embeddings))
    if settings.method == DMS and settings.compresses and length and settings.window_size >= length - 1:
        raise ValueError(
            f"--dmc-window-size {settings.window_size}: no token of a sequence of {length} leaves it, so that nothing "
            "would be evicted; give a smaller window, or longer sequences (--seq-length)"
        )


def _data_parallel_size(given: argparse.Namespace, ranks: int) -> int:
    """Copies of the model; what does not divide the ranks is refused by Megatron."""
    sizes = (given.tensor_model_parallel_size, given.pipeline_model_parallel_size, given.context_parallel_size)
    return max(1, ranks // math.prod(size or 1 for size in sizes))


def short_stage(settings: DMCConfig, steps: int | None) -> str | None:
    """A warning where a stage is shorter than what is known to do no harm, else None."""
    harmless = settings.published.harmless_steps
    if steps is None or steps >= harmless:
        return None
    return (
        f"warning: --train-iters {steps}: {settings.stage} has {harmless} steps in the published recipe, and "
        "the model loses much in a few: five steps raised the perplexity of a pretrained model of 135 million "
        "parameters from 7.76 to 10.82"
    )

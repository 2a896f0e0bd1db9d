"""The published recipe for ``launch/train.sh`` and ``launch/train.sbatch``, with settings from their variables.

``python -m megatron_dmc.recipes.launch`` prints the stages in their order, with the name of a stage its flags; one per
line. ``launch/README.md`` explains the variables.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_dmc.config import DMCConfig
from megatron_dmc.recipes.recipe import Recipe, data_flags, published
from megatron_dmc.runs.layout import CACHE_FOLDER
from megatron_dmc.stages import CONSOLIDATE, RETROFIT, ZERO_OUT
from megatron_dmc.support.errors import EXIT_USER_ERROR
from megatron_dmc.training.arguments import flag_list
from megatron_dmc.training.run_defaults import SAVE_INTERVAL

PUBLISHED_STEPS = {
    stage: steps(4.0)
    for stage in (ZERO_OUT, RETROFIT, CONSOLIDATE)
    if (steps := DMCConfig(stage=stage.name).published.steps) is not None
}
"""For a ratio of 4 ([DMC] section 4)."""

REQUIRED = {
    "BASE": "checkpoint made by megatron-dmc convert import",
    "DATA": "directory made by megatron-dmc data prepare",
    "RUN": "output directory",
}
DEFAULTS = {
    "TARGET_CR": "4",
    "SEQ_LENGTH": "4096",
    "GLOBAL_BATCH_SIZE": "1024",
    "MICRO_BATCH_SIZE": "1",
    "SAVE_INTERVAL": str(SAVE_INTERVAL),
    "EVAL_ITERS": "0",
    **{f"{stage.name.upper()}_STEPS": str(steps) for stage, steps in PUBLISHED_STEPS.items()},
}


def settings_from(environment: Mapping[str, str]) -> dict[str, str]:
    """All variables with their values; an empty one counts as unset.

    Raises:
        ValueError: one without a default is missing.
    """
    settings = {name: environment.get(name) or DEFAULTS.get(name, "") for name in (*REQUIRED, *DEFAULTS)}
    for name, meaning in REQUIRED.items():
        if not settings[name]:
            raise ValueError(f"{name}: {meaning}; it is not set")
    return settings


def published_recipe(settings: Mapping[str, str]) -> Recipe:
    """The three stages of [DMC], with the lengths and sizes of ``settings``.

    Raises:
        ValueError: a variable is not a number, or stages that cannot be.
    """
    numbers = {name: _whole(name, settings[name]) for name in DEFAULTS if name != "TARGET_CR"}
    stages = {
        stage.name: published(stage, numbers[f"{stage.name.upper()}_STEPS"], numbers["GLOBAL_BATCH_SIZE"])
        for stage in PUBLISHED_STEPS
    }
    return Recipe(
        stages=stages,
        dmc=DMCConfig(target_cr=float(settings["TARGET_CR"])),
        retrofit_temperature=None,
        seq_length=numbers["SEQ_LENGTH"],
        micro_batch_size=numbers["MICRO_BATCH_SIZE"],
    )


def stage_flags(name: str, settings: Mapping[str, str]) -> list[str]:
    """Flags of ``megatron-dmc train`` for one stage; the learning rate is left to the stage."""
    recipe = published_recipe(settings)
    order, run = recipe.retrofit_stages, Path(settings["RUN"])
    if name not in order:
        raise ValueError(f"no stage {name} in the recipe: it has {', '.join(order)}")
    previous = order.index(name) - 1
    flags = {
        "--dmc-stage": name,
        "--dmc-target-cr": settings["TARGET_CR"],
        "--dmc-total-samples": recipe.total_samples,
        "--pretrained-checkpoint": run / order[previous] if previous >= 0 else settings["BASE"],
        "--save": run / name,
        "--save-interval": settings["SAVE_INTERVAL"],
        **data_flags(Path(settings["DATA"]), run / CACHE_FOLDER),
        "--train-iters": recipe.stage(name).steps,
        "--eval-iters": settings["EVAL_ITERS"],
        "--seq-length": recipe.seq_length,
        "--global-batch-size": recipe.stage(name).batch_size,
        "--micro-batch-size": recipe.micro_batch(name),
    }
    return flag_list(flags)


def main(arguments: list[str]) -> int:
    """Print the order of the stages, or the flags of one; the exit code."""
    try:
        settings = settings_from(os.environ)
        lines = stage_flags(arguments[0], settings) if arguments else published_recipe(settings).retrofit_stages
    except ValueError as error:
        print(f"launch: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    print("\n".join(lines))
    return 0


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{name}={text!r}: must be a whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

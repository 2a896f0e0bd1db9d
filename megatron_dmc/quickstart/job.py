"""The steps of the quickstart, in order. Each is done once; the next start continues with the first that is missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dmc.data.corpus import python_source
from megatron_dmc.data.manifest import Manifest
from megatron_dmc.data.prepare import Split, prepare_directory
from megatron_dmc.quickstart.recipe import SMALL_LLAMA, Recipe, flags, shape_flags
from megatron_dmc.quickstart.training import run_stage
from megatron_dmc.report.metrics import CONTROL_PREFIX
from megatron_dmc.run_directory import RunDirectory

RETROFIT_STAGES = ("zero_out", "retrofit", "consolidate")
BASE = "base"
BASE_HF = "base_hf"
BASE_MEGATRON = "base_megatron"
EXPORT = "export"


@dataclass(frozen=True)
class Job:
    """One run of the quickstart.

    Attributes:
        run: its directory.
        recipe: what to do.
        hf_model: the user's Llama, or None to train a small one from scratch.
    """

    run: RunDirectory
    recipe: Recipe
    hf_model: Path | None = None


def train_everything(job: Job) -> None:
    """Data, base model, conversion, the three stages and the control."""
    run = job.run
    run.step("data", partial(_prepare_data, job))
    if job.hf_model is None:
        run.step("base", partial(_train_base, job))
    run.step("convert", partial(_convert, job))
    for control in (False, True):
        start = run / BASE_MEGATRON
        for stage in RETROFIT_STAGES:
            directory = run / (f"{CONTROL_PREFIX}_{stage}" if control else stage)
            run.step(directory.name, partial(_train_stage, job, stage, directory, start, control))
            start = directory
    run.step("export", partial(_export, job))


def _prepare_data(job: Job) -> dict[str, Any]:
    tokenizer = SMALL_LLAMA.vocab_size if job.hf_model is None else job.hf_model
    manifests = prepare_directory(
        python_source(),
        job.run / "data",
        tokenizer=tokenizer,
        split=Split(),
        overwrite=True,
    )
    _check_enough(manifests["train"], job.recipe)
    return {name: dict(manifest) for name, manifest in manifests.items()}


def _check_enough(train: Manifest, recipe: Recipe) -> None:
    """No token may be seen twice."""
    has = (train["num_tokens"] - 1) // recipe.seq_length
    if recipe.total_samples > has:
        raise ValueError(
            f"the stages read {recipe.total_samples} sequences of {recipe.seq_length} tokens, the data has {has} and "
            "none is read twice: lower the steps, --global-batch-size or --seq-length"
        )


def _train_base(job: Job) -> dict[str, Any]:
    from checkpoints_convert.megatron_to_hf import export_checkpoint

    own = [*shape_flags(SMALL_LLAMA), *_data_flags(job)]
    run_stage([*own, *flags(job.recipe, "base")], job.run / BASE, job.recipe.base.steps)
    export_checkpoint(job.run / BASE, job.run / BASE_HF, tokenizer=job.run / "data" / "tokenizer", overwrite=True)
    return {"steps": job.recipe.base.steps}


def _convert(job: Job) -> dict[str, Any]:
    from checkpoints_convert.hf_to_megatron import import_checkpoint

    source = job.hf_model or job.run / BASE_HF
    import_checkpoint(source, job.run / BASE_MEGATRON, overwrite=True)
    return {"source": str(source)}


def _train_stage(job: Job, stage: str, directory: Path, base: Path, control: bool) -> dict[str, Any]:
    steps = job.recipe.stage(stage).steps
    own = ["--pretrained-checkpoint", str(base), *_data_flags(job)]
    run_stage([*own, *flags(job.recipe, stage, control=control)], directory, steps)
    return {"steps": steps}


def _data_flags(job: Job) -> list[str]:
    data = job.run / "data"
    paths = {"train": "train", "valid": "validation", "test": "test"}
    splits = [part for flag, name in paths.items() for part in (f"--{flag}-data-path", str(data / name))]
    return [*splits, "--data-cache-path", str(job.run / "cache")]


def _export(job: Job) -> dict[str, Any]:
    from checkpoints_convert.megatron_to_hf import export_checkpoint

    export_checkpoint(
        job.run / RETROFIT_STAGES[-1], job.run / EXPORT, tokenizer=job.run / "data" / "tokenizer", overwrite=True
    )
    return {"directory": EXPORT}

"""The steps of the quickstart, in order. Each is done once; the next start continues with the first that is missing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dmc.data.corpus import python_source
from megatron_dmc.data.manifest import Manifest
from megatron_dmc.data.prepare import Split, prepare_directory
from megatron_dmc.recipes.generate import generate_in_new_process
from megatron_dmc.recipes.measure import measure
from megatron_dmc.recipes.recipe import SMALL_LLAMA, Recipe, data_flags, flags
from megatron_dmc.recipes.run_stages import StageRun, run_stages
from megatron_dmc.report.collect import RunFacts
from megatron_dmc.report.write import write_report
from megatron_dmc.runs.directory import RunDirectory
from megatron_dmc.runs.layout import (
    BASE,
    BASE_HF,
    BASE_MEGATRON,
    CACHE_FOLDER,
    DATA_FOLDER,
    EVALUATION_FOLDER,
    EXPORT,
    GENERATION_FILE,
    REPORT_FOLDER,
    stage_directory,
)
from megatron_dmc.support.files import read_json, write_json
from megatron_dmc.training.arguments import flag_list
from megatron_dmc.training.model_flags import model_flags

NEW_TOKENS = 160


@dataclass(frozen=True)
class Job:
    """One run of the quickstart.

    Attributes:
        run: its directory.
        recipe: what to do.
        prompt: text to continue at the end.
        hf_model: the user's Llama, or None to train a small one from scratch.
    """

    run: RunDirectory
    recipe: Recipe
    prompt: str
    hf_model: Path | None = None


def run_job(job: Job) -> RunFacts:
    """All steps that are not done yet; what the run found.

    Raises:
        ValueError: too little data for the recipe, or what a step refuses.
        InfrastructureError: a process of its own failed.
    """
    _train_everything(job)
    _measure_everything(job)
    job.run.step("export", partial(_export, job))
    job.run.step("generation", partial(_generate, job))
    return write_report([job.run.path], job.run / REPORT_FOLDER)[0]


def _train_everything(job: Job) -> None:
    """Data, base model, conversion, the three stages and the control."""
    run = job.run
    run.step("data", partial(_prepare_data, job))
    if job.hf_model is None:
        run.step("base", partial(_train_base, job))
    run.step("convert", partial(_convert, job))
    for stage in job.recipe.retrofit_stages:
        run.step(stage, partial(_train_stage, job, stage))


def _prepare_data(job: Job) -> dict[str, Any]:
    tokenizer = SMALL_LLAMA.vocab_size if job.hf_model is None else job.hf_model
    manifests = prepare_directory(
        python_source(),
        job.run / DATA_FOLDER,
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
    steps = job.recipe.stage(BASE).steps
    own = [*flag_list(model_flags(SMALL_LLAMA)), *_data_flags(job)]
    run_stages([StageRun([*own, *flags(job.recipe, BASE)], job.run / BASE, steps)])
    _to_hugging_face(job, job.run / BASE, job.run / BASE_HF)
    return {"steps": steps}


def _convert(job: Job) -> dict[str, Any]:
    from checkpoints_convert.hf_to_megatron import import_checkpoint
    from checkpoints_convert.options import Options

    source = job.hf_model or job.run / BASE_HF
    import_checkpoint(source, job.run / BASE_MEGATRON, options=Options(overwrite=True))
    return {"source": str(source)}


def _train_stage(job: Job, stage: str) -> dict[str, Any]:
    """Train a stage and its control: side by side where two small models share the machine."""
    steps = job.recipe.stage(stage).steps
    pair = [
        StageRun(
            flags=[
                "--pretrained-checkpoint",
                str(_start_of(job, stage, control)),
                *_data_flags(job),
                *flags(job.recipe, stage, control=control),
            ],
            directory=job.run / stage_directory(stage, control=control),
            steps=steps,
        )
        for control in (False, True)
    ]
    for together in [pair] if job.hf_model is None else [[one] for one in pair]:
        run_stages(together)
    return {"steps": steps}


def _start_of(job: Job, stage: str, control: bool) -> Path:
    """The checkpoint that a stage starts from."""
    order = job.recipe.retrofit_stages
    position = order.index(stage)
    return job.run / (stage_directory(order[position - 1], control=control) if position else BASE_MEGATRON)


def _data_flags(job: Job) -> list[str]:
    return flag_list(data_flags(job.run / DATA_FOLDER, job.run / CACHE_FOLDER))


def _measure_everything(job: Job) -> None:
    last = job.recipe.retrofit_stages[-1]
    models = {"base": BASE_MEGATRON, "control": stage_directory(last, control=True), "dmc": last}
    for name, directory in models.items():
        job.run.step(f"measure_{name}", partial(_measure, job, name, job.run / directory))


def _measure(job: Job, name: str, model: Path) -> dict[str, Any]:
    recipe = job.recipe
    data = job.run / DATA_FOLDER / "test"
    result = measure(model, data, recipe.seq_length, recipe.eval_sequences, decode=name == "dmc")
    write_json(job.run / EVALUATION_FOLDER / f"{name}.json", result)
    return {path: result[path]["compression_ratio"] for path in ("teacher_forced", "decode") if result[path]}


def _generate(job: Job) -> dict[str, Any]:
    write_json(job.run / GENERATION_FILE, generate_in_new_process(job.run / EXPORT, job.prompt, NEW_TOKENS))
    return {"prompt": job.prompt}


def _export(job: Job) -> dict[str, Any]:
    measured = read_json(job.run / EVALUATION_FOLDER / "dmc.json", finite=False)["decode"]["compression_ratio"]
    _to_hugging_face(job, job.run / job.recipe.retrofit_stages[-1], job.run / EXPORT, measured)
    return {"directory": EXPORT}


def _to_hugging_face(job: Job, checkpoint: Path, directory: Path, measured_cr: float | None = None) -> None:
    from checkpoints_convert.megatron_to_hf import export_checkpoint
    from checkpoints_convert.options import Options

    tokenizer = job.run / DATA_FOLDER / "tokenizer"
    options = Options(overwrite=True)
    export_checkpoint(checkpoint, directory, tokenizer=tokenizer, measured_cr=measured_cr, options=options)

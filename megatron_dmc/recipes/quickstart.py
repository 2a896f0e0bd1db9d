"""The steps of the quickstart, in order. Each is done once; the next start continues with the first that is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_dmc.data.corpus import python_source
from megatron_dmc.data.manifest import Manifest
from megatron_dmc.data.prepare import Split, prepare_directory
from megatron_dmc.recipes.generate import generate_in_new_process
from megatron_dmc.recipes.measure import measure
from megatron_dmc.recipes.recipe import SMALL_LLAMA, Recipe, flags, shape_flags
from megatron_dmc.recipes.run_stages import StageRun, run_stages
from megatron_dmc.report.collect import EVALUATION_FOLDER, GENERATION_FILE, RunFacts
from megatron_dmc.report.metrics import COMPRESSING_ORDER, CONTROL_PREFIX
from megatron_dmc.report.write import write_report
from megatron_dmc.runs.directory import RunDirectory
from megatron_dmc.support.files import write_json

BASE = "base"
BASE_HF = "base_hf"
BASE_MEGATRON = "base_megatron"
EXPORT = "export"
REPORT = "report"
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
    return write_report([job.run.path], job.run / REPORT)[0]


def _train_everything(job: Job) -> None:
    """Data, base model, conversion, the three stages and the control."""
    run = job.run
    run.step("data", partial(_prepare_data, job))
    if job.hf_model is None:
        run.step("base", partial(_train_base, job))
    run.step("convert", partial(_convert, job))
    for stage in COMPRESSING_ORDER:
        run.step(stage, partial(_train_stage, job, stage))


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
    own = [*shape_flags(SMALL_LLAMA), *_data_flags(job)]
    run_stages([StageRun([*own, *flags(job.recipe, "base")], job.run / BASE, job.recipe.base.steps)])
    _to_hugging_face(job, job.run / BASE, job.run / BASE_HF)
    return {"steps": job.recipe.base.steps}


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
            directory=job.run / _directory(stage, control),
            steps=steps,
        )
        for control in (False, True)
    ]
    for together in [pair] if job.hf_model is None else [[one] for one in pair]:
        run_stages(together)
    return {"steps": steps}


def _directory(stage: str, control: bool) -> str:
    return f"{CONTROL_PREFIX}_{stage}" if control else stage


def _start_of(job: Job, stage: str, control: bool) -> Path:
    """The checkpoint that a stage starts from."""
    position = COMPRESSING_ORDER.index(stage)
    return job.run / (_directory(COMPRESSING_ORDER[position - 1], control) if position else BASE_MEGATRON)


def _data_flags(job: Job) -> list[str]:
    data = job.run / "data"
    paths = {"train": "train", "valid": "validation", "test": "test"}
    splits = [part for flag, name in paths.items() for part in (f"--{flag}-data-path", str(data / name))]
    return [*splits, "--data-cache-path", str(job.run / "cache")]


def _measure_everything(job: Job) -> None:
    last = COMPRESSING_ORDER[-1]
    models = {"base": BASE_MEGATRON, "control": _directory(last, control=True), "dmc": last}
    for name, directory in models.items():
        job.run.step(f"measure_{name}", partial(_measure, job, name, job.run / directory))


def _measure(job: Job, name: str, model: Path) -> dict[str, Any]:
    recipe = job.recipe
    data = job.run / "data" / "test"
    result = measure(model, data, recipe.seq_length, recipe.eval_sequences, decode=name == "dmc")
    write_json(job.run / EVALUATION_FOLDER / f"{name}.json", result)
    return {path: result[path]["compression_ratio"] for path in ("teacher_forced", "decode") if result[path]}


def _generate(job: Job) -> dict[str, Any]:
    write_json(job.run / GENERATION_FILE, generate_in_new_process(job.run / EXPORT, job.prompt, NEW_TOKENS))
    return {"prompt": job.prompt}


def _export(job: Job) -> dict[str, Any]:
    dmc = job.run / EVALUATION_FOLDER / "dmc.json"
    measured = json.loads(dmc.read_text(encoding="utf-8"))["decode"]["compression_ratio"]
    _to_hugging_face(job, job.run / COMPRESSING_ORDER[-1], job.run / EXPORT, measured)
    return {"directory": EXPORT}


def _to_hugging_face(job: Job, checkpoint: Path, directory: Path, measured_cr: float | None = None) -> None:
    from checkpoints_convert.megatron_to_hf import export_checkpoint
    from checkpoints_convert.options import Options

    tokenizer = job.run / "data" / "tokenizer"
    options = Options(overwrite=True)
    export_checkpoint(checkpoint, directory, tokenizer=tokenizer, measured_cr=measured_cr, options=options)

"""``megatron-dmc quickstart``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.runs.layout import BASE, REPORT_FOLDER
from megatron_dmc.stages import retrofit_order

if TYPE_CHECKING:
    from megatron_dmc.recipes.recipe import Recipe
    from megatron_dmc.report.collect import RunFacts

PROMPT = "def read_lines(path):\n"
SIZES = ("seq_length", "micro_batch_size", "eval_sequences")


def add_parser(subparsers: Any) -> None:
    """Add the command ``quickstart``."""
    parser = subparsers.add_parser(
        "quickstart",
        help="the main job on a small model, end to end",
        description="Trains a small Llama on the source of Python's standard library, retrofits it with DMC beside an "
        "uncompressed control, measures both, exports the result and writes a report. After an interruption the same "
        "command continues. Exit code 2: the result misses its ratio, its quality, or the two paths disagree.",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="directory (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier run in the output directory")
    parser.add_argument(
        "--target-cr", type=float, default=4.0, help="compression ratio to reach (default: %(default)s)"
    )
    parser.add_argument("--hf-model", type=Path, metavar="DIR", help="retrofit this Llama instead of a small new one")
    parser.add_argument(
        "--max-hours", type=float, default=12.0, help="refuse an --hf-model that needs longer (default: %(default)s)"
    )
    for stage in (BASE, *retrofit_order()):
        parser.add_argument(f"--{stage.replace('_', '-')}-steps", type=int, help=f"length of the stage {stage}")
    for size, meaning in zip(
        SIZES,
        ("tokens per sequence", "sequences at once", "sequences to measure on"),
        strict=True,
    ):
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, help=meaning)
    parser.add_argument("--global-batch-size", type=int, help="sequences per step, in every stage")
    parser.add_argument("--prompt", default=PROMPT, help="text to continue at the end (default: %(default)r)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run or continue the job; the exit code says whether its result is good."""
    recipe = _recipe(args)
    if args.hf_model is not None:
        _check_model(args, recipe)
    from megatron_dmc.recipes.quickstart import Job, run_job
    from megatron_dmc.runs.directory import open_run
    from megatron_dmc.support.findings import show

    model = None if args.hf_model is None else args.hf_model.resolve()
    configuration = {"recipe": recipe.to_dict(), "prompt": args.prompt, "hf_model": model and str(model)}
    with open_run(args.output, configuration, overwrite=args.overwrite) as opened:
        facts = run_job(Job(opened, recipe, args.prompt, model))
    _print_result(facts)
    code = show(facts.quality, as_json=False)
    print(f"\nreport: {args.output / REPORT_FOLDER / 'report.md'}")
    return code


def _recipe(args: argparse.Namespace) -> Recipe:
    from megatron_dmc.recipes.recipe import SMALL, user_model_recipe

    recipe = SMALL if args.hf_model is None else user_model_recipe()
    if args.hf_model is not None and args.base_steps:
        raise ValueError("--base-steps trains a small base model, --hf-model brings one: give one of the two")
    if args.global_batch_size is not None:
        recipe = recipe.with_batch_size(args.global_batch_size)
    lengths = {name: getattr(args, f"{name}_steps") for name in recipe.stages}
    recipe = recipe.with_stages(
        {name: recipe.stage(name).of_length(steps) for name, steps in lengths.items() if steps is not None}
    )
    sizes: dict[str, Any] = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
    return dataclasses.replace(recipe, dmc=dataclasses.replace(recipe.dmc, target_cr=args.target_cr), **sizes)


def _check_model(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse a model that is no Llama, or that this machine cannot train."""
    from megatron_dmc.models.hugging_face import parse_hf_config
    from megatron_dmc.models.megatron import refuse_for_stock
    from megatron_dmc.recipes.estimate import estimate, measure_peak_flops, refuse_what_cannot_fit

    config, dmc = parse_hf_config(args.hf_model)
    if dmc is not None:
        raise ValueError(f"{args.hf_model} is compressed already: give a plain model")
    refuse_for_stock(config)  # the control is Megatron's own model
    if recipe.seq_length > config.max_position_embeddings:
        raise ValueError(f"--seq-length {recipe.seq_length}: the model reads at most {config.max_position_embeddings}")
    needed = estimate(config, recipe, measure_peak_flops())
    print(f"the retrofit of {args.hf_model} needs {needed}", flush=True)
    refuse_what_cannot_fit(needed, args.output, args.max_hours)


def _print_result(facts: RunFacts) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_dmc.report.words import RESULT_HEADS, result_rows

    table = Table(*RESULT_HEADS, title="Held-out text", title_justify="left", title_style="bold", box=None)
    for row in result_rows(facts):
        table.add_row(*row)
    console = Console()
    console.print(table)
    generated, cache = facts.generation["results"][0], facts.generation["cache"]
    console.print("\nText from the exported model, continued with the compressed cache", style="bold")
    console.print(generated["prompt"] + generated["text"], markup=False, highlight=False)
    console.print(
        f"\nIts cache holds {cache['entries']:,} entries ({cache['bytes']:,} bytes); uncompressed it would hold "
        f"{cache['uncompressed_entries']:,} ({cache['uncompressed_bytes']:,} bytes).\n",
        highlight=False,
    )

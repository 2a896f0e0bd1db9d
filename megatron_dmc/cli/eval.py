"""``megatron-dmc eval``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.cli.eval_harness import HUMANEVAL, add_harness_options
from megatron_dmc.cli.evaluate import add_origin_options, numbers, origin
from megatron_dmc.cli.model_options import add_model_options, open_model, open_tokenizer
from megatron_dmc.cli.text_options import add_memory_options

DESCRIPTION = """Asks a model questions, through the compressed cache. Tasks that are made up here, of exact length:
passkey, niah, niah_multikey, variable_tracking, frequent_words (scored by whether the answer contains what was asked
for). Standard benchmarks by lm-evaluation-harness (extra [eval]) from your own files: mmlu, piqa, arc_easy,
arc_challenge, hellaswag, winogrande, boolq, gsm8k, humaneval, or a task file of your own (.yaml). Nothing is
downloaded."""
LENGTHS = [1024, 2048]
DEPTHS = 40


def add_parser(subparsers: Any) -> None:
    """Add the command ``eval``."""
    parser = subparsers.add_parser("eval", help="long-context tasks and standard benchmarks", description=DESCRIPTION)
    add_model_options(parser)
    parser.add_argument(
        "--tasks", type=_words, required=True, metavar="NAME,...", help="names of tasks, and task files (.yaml)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write results.json and pictures to this directory")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put questions into the chat template beside the tokenizer (default: plain text)",
    )
    generated = parser.add_argument_group("tasks that are made up here")
    generated.add_argument(
        "--lengths",
        type=numbers,
        default=LENGTHS,
        metavar="N,N,...",
        help="tokens of prompt and answer together (default: 1024,2048)",
    )
    generated.add_argument(
        "--depths", type=int, default=DEPTHS, metavar="N", help="depths in the text, evenly spaced (default: 40)"
    )
    generated.add_argument("--seeds", type=numbers, default=[0], metavar="N,N,...", help="one set each (default: 0)")
    add_harness_options(parser)
    parser.add_argument("--max-sequences", type=int, default=32, help="texts in the cache at once (default: 32)")
    add_memory_options(parser)
    add_origin_options(parser)
    parser.set_defaults(run=run)


def _words(text: str) -> list[str]:
    """Names with commas between them, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def run(args: argparse.Namespace) -> int:
    """Run the tasks, print and write what was found."""
    from megatron_dmc.cli import eval_generated, eval_harness
    from megatron_dmc.report.requirements import require_matplotlib
    from megatron_dmc.support.files import to_json, write_json

    if args.output is not None:
        require_matplotlib()
    made_here, standard = _sorted_out(args.tasks)
    asked = eval_harness.read(args, standard)
    opened = open_model(args)
    said = origin(args, opened)
    tokenizer = open_tokenizer(args, opened)
    results = eval_generated.ask(args, made_here, opened, tokenizer) if made_here else []
    harness = eval_harness.ask(args, asked, opened, tokenizer) if standard else None
    found = {
        **said,
        "form": "chat template" if args.chat else "plain text",
        "path_of_texts": "decode",
        "tokenizer": {"file": str(tokenizer.path), "first_tokens": tokenizer.first},
        "generated_tasks": [result.to_dict() for result in results],
        "standard_tasks": harness,
    }
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / "results.json", found)
        for picture in eval_generated.pictures(args.output, results):
            print(picture, file=sys.stderr)
    shown = [*(eval_generated.lines_of(results) if results else []), *eval_harness.lines_of(harness)]
    print(to_json(found, indent=2) if args.json else "\n".join(shown))
    return 0


def _sorted_out(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tasks that are made up here, and those of the harness. Raises ``ValueError`` on an unknown one."""
    from megatron_dmc.evaluation.harness.task_files import SUFFIXES, shipped_names
    from megatron_dmc.evaluation.tasks import TASKS

    standard = [*shipped_names(), HUMANEVAL]
    if not names:
        raise ValueError("--tasks names no task")
    for name in names:
        if name not in TASKS and name not in standard and not name.endswith(SUFFIXES):
            raise ValueError(f"task {name!r}: must be one of {', '.join([*TASKS, *standard])}, or a task file (.yaml)")
    return [name for name in names if name in TASKS], [name for name in names if name not in TASKS]

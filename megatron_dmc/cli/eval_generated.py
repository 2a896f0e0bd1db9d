"""The part of ``megatron-dmc eval`` whose questions are made up here."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_dmc.cli.model_options import OpenedModel
from megatron_dmc.cli.output import aligned
from megatron_dmc.cli.text_options import make_engine

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.evaluation.long_context import Example, Form, TaskResult


def ask(args: argparse.Namespace, names: Sequence[str], opened: OpenedModel, tokenizer: Tokenizer) -> list[TaskResult]:
    """Every task at every length; all questions are made before the first is asked."""
    from megatron_dmc.data.tokenizer.end_tokens import end_tokens
    from megatron_dmc.evaluation.long_context import TaskResult, answer
    from megatron_dmc.support.progress import progress

    examples = _examples(args, names, opened, tokenizer)
    longest = max(args.lengths)
    engine = make_engine(
        args,
        opened,
        tokenizer,
        lengths=[example.length for group in examples for example in group],
        least=longest,
        max_sequences=args.max_sequences,
    )
    ends = end_tokens(opened.source.companions, tokenizer).ids
    results: list[TaskResult] = []

    def note() -> str:
        return f"{results[-1].task} at {results[-1].length}: {results[-1].score.mean:.1%}" if results else ""

    num_tokens = sum(_new_tokens(group) for group in examples)
    with progress("answering", num_tokens, "tokens", note=note) as advance:
        for group in examples:
            answers = answer(engine, group, ends, advance)
            results.append(TaskResult(group[0].task, group[0].length, answers))
    return results


def _examples(
    args: argparse.Namespace, names: Sequence[str], opened: OpenedModel, tokenizer: Tokenizer
) -> list[list[Example]]:
    """The questions of each task and length."""
    from megatron_dmc.evaluation.long_context import make_examples
    from megatron_dmc.evaluation.tasks import TASKS
    from megatron_dmc.support.progress import progress

    if too_long := [length for length in args.lengths if length > opened.max_tokens]:
        raise ValueError(f"--lengths {too_long[0]}: the model reads at most {opened.max_tokens} tokens")
    form = _form(args, opened, tokenizer)
    pairs = [(TASKS[name], length) for name in names for length in args.lengths]
    groups = []
    with progress("making questions", len(pairs) * args.depths * len(args.seeds), "questions") as advance:
        for task, length in pairs:
            groups.append(make_examples(task, form, length, args.depths, args.seeds))
            advance(len(groups[-1]))
    return groups


def _new_tokens(group: list[Example]) -> int:
    from megatron_dmc.evaluation.tasks import TASKS

    return sum(TASKS[example.task].max_new_tokens for example in group)


def _form(args: argparse.Namespace, opened: OpenedModel, tokenizer: Tokenizer) -> Form:
    """How the model reads a question: as plain text, or as a user's turn."""
    from megatron_dmc.data.tokenizer.chat_template import read_chat_template

    if not args.chat:
        return lambda text, prefix: tokenizer.encode_prompt(f"{text}\n{prefix}")
    template = read_chat_template(tokenizer.path.parent, opened.source.companions)
    return lambda text, prefix: tokenizer.encode_prompt(template.render([{"role": "user", "content": text}]) + prefix)


def pictures(output: Path, results: list[TaskResult]) -> Iterator[Path]:
    """A heat map of each task with depths."""
    from megatron_dmc.evaluation.tasks import TASKS
    from megatron_dmc.report.task_figures import heat_map

    for name in dict.fromkeys(result.task for result in results):
        if TASKS[name].has_depth:
            found = {result.length: result.by_depth() for result in results if result.task == name}
            path = output / f"{name}.png"
            heat_map(path, name, found)
            yield path


def lines_of(results: list[TaskResult]) -> list[str]:
    """The result as people read it."""
    rows = [
        (
            result.task,
            str(result.length),
            f"{result.score.mean:.1%} +- {result.score.standard_error:.1%}",
            str(len(result.answers)),
            f"{result.usage.num_entries / result.usage.num_heads / len(result.answers):.1f}",
            f"{result.usage.compression_ratio:.2f}",
        )
        for result in results
    ]
    return aligned(("task", "length", "score", "questions", "entries per head", "compression ratio"), rows)

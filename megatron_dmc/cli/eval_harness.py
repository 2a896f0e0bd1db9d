"""The part of ``megatron-dmc eval`` that asks standard benchmarks."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dmc.cli.model_options import OpenedModel
from megatron_dmc.cli.output import aligned

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.evaluation.harness.continuations import Scorer
    from megatron_dmc.evaluation.harness.task_files import TaskFile

HUMANEVAL = "humaneval"
EXECUTE = "--execute-generated-code"
PATHS = ("teacher-forced", "decode")


def add_harness_options(parser: argparse.ArgumentParser) -> None:
    """Add what standard benchmarks need."""
    group = parser.add_argument_group("standard benchmarks")
    group.add_argument("--data-dir", type=Path, metavar="DIR", help="folder of their JSON files")
    group.add_argument("--limit", type=int, metavar="N", help="the first so many questions of each (default: all)")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each (default: as the task says)")
    group.add_argument(
        "--path",
        choices=PATHS,
        help="how choices are scored: in one pass with their questions, or token by token through the cache (default: "
        "the former where the method allows it)",
    )
    group.add_argument(
        EXECUTE, action="store_true", help="run the programs that the model writes for humaneval, on this machine"
    )


class Asked(NamedTuple):
    """What was read of the tasks."""

    files: list[TaskFile]
    programs: list[dict[str, Any]]


def read(args: argparse.Namespace, names: Sequence[str]) -> Asked:
    """Task files and their records.

    Raises:
        ValueError: a missing field, file, flag or package.
    """
    from megatron_dmc.evaluation.harness.pass_at_1 import FIELDS
    from megatron_dmc.evaluation.harness.task_files import read_records, read_task

    if not names:
        return Asked([], [])
    if args.data_dir is None:
        raise ValueError(
            f"{', '.join(names)}: give the folder of the JSON files with --data-dir; nothing is downloaded"
        )
    for option, value in (("--limit", args.limit), ("--num-fewshot", args.num_fewshot)):
        if value is not None and value < (option == "--limit"):
            raise ValueError(f"{option} {value}: must be at least {int(option == '--limit')}")
    if set(names) - {HUMANEVAL} and importlib.util.find_spec("lm_eval") is None:
        raise ValueError("standard benchmarks need lm-evaluation-harness: pip install 'megatron_dmc[eval]'")
    programs = []
    if HUMANEVAL in names:
        if not args.execute_generated_code:
            raise ValueError(f"{HUMANEVAL} runs programs that the model wrote: allow it with {EXECUTE}")
        programs = read_records(args.data_dir / f"{HUMANEVAL}.jsonl", FIELDS)[: args.limit]
    return Asked([task for name in names if name != HUMANEVAL for task in read_task(name, args.data_dir)], programs)


def ask(args: argparse.Namespace, asked: Asked, opened: OpenedModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Results, ready for JSON."""
    from megatron_dmc.data.tokenizer.end_tokens import end_tokens
    from megatron_dmc.evaluation.harness.pass_at_1 import pass_at_1
    from megatron_dmc.inference.cache.usage import CacheUsage

    scorer = _scorer(args, opened)
    ends = end_tokens(opened.source.companions, tokenizer).ids
    found: dict[str, Any] = {"tasks": {}, "groups": {}}
    if asked.files:
        found = _ask_harness(args, asked.files, opened, tokenizer, scorer, ends)
    if asked.programs:
        found["tasks"][HUMANEVAL] = pass_at_1(scorer, tokenizer, ends, asked.programs)
    found["path_of_scores"] = scorer.path
    found["path_of_texts"] = "decode"
    found["num_truncated"] = scorer.num_truncated
    found["cache"] = CacheUsage.total(scorer.usages).to_dict()
    return found


def _scorer(args: argparse.Namespace, opened: OpenedModel) -> Scorer:
    """The model, if a batch of usual texts fits beside it."""
    from megatron_dmc.evaluation.harness.continuations import TOKENS_AT_ONCE, Scorer
    from megatron_dmc.evaluation.scores import Storage
    from megatron_dmc.inference.memory_need import Need

    memory = opened.memory
    workspace = memory.workspace(TOKENS_AT_ONCE, args.max_sequences)
    need = Need(memory.weights, memory.cache([TOKENS_AT_ONCE]), workspace)
    print(need.require(opened.device_memory, "take --dtype bfloat16 or a smaller model"), file=sys.stderr)
    storage = Storage(opened.block_size, opened.kv_format.name)
    return Scorer(opened.load(), args.path, args.max_sequences, storage)


def _ask_harness(
    args: argparse.Namespace,
    files: Sequence[TaskFile],
    opened: OpenedModel,
    tokenizer: Tokenizer,
    scorer: Scorer,
    ends: frozenset[int],
) -> dict[str, Any]:
    from megatron_dmc.data.tokenizer.chat_template import read_chat_template
    from megatron_dmc.evaluation.harness.run import go_offline, run_harness

    go_offline()
    from megatron_dmc.evaluation.harness.adapter import CompressedLM

    template = read_chat_template(tokenizer.path.parent, opened.source.companions) if args.chat else None
    model = CompressedLM(scorer, tokenizer, ends, template)
    return run_harness(model, files, limit=args.limit, num_fewshot=args.num_fewshot, chat=args.chat)


def lines_of(found: Mapping[str, Any] | None) -> list[str]:
    """The result as people read it."""
    if found is None:
        return []
    rows = [
        (
            name,
            key.removesuffix(",none"),
            f"{value:.2%}{_error(figures['metrics'], key)}",
            str(figures["num_questions"]),
        )
        for name, figures in {**found["tasks"], **found["groups"]}.items()
        for key, value in figures["metrics"].items()
        if "_stderr" not in key
    ]
    said = f"choices scored by the path {found['path_of_scores']}, texts by the path {found['path_of_texts']}"
    return [*aligned(("task", "metric", "score", "questions"), rows), said]


def _error(metrics: Mapping[str, Any], key: str) -> str:
    error = metrics.get(key.replace(",", "_stderr,"))
    return f" +- {error:.2%}" if isinstance(error, float) else ""

"""Options of the commands that write text, and the engine that they make."""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megatron_dmc.cli.model_options import OpenedModel

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.data.tokenizer.end_tokens import EndTokens
    from megatron_dmc.inference.engine import Engine
    from megatron_dmc.inference.sampling import SamplingParams


def add_text_options(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Add how a text is continued, and in how much memory."""
    texts = parser.add_argument_group("text")
    texts.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        help=f"tokens per text at most (default: {max_new_tokens})",
    )
    texts.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    texts.add_argument("--top-k", type=int, default=0, help="sample from so many tokens (default: 0, all)")
    texts.add_argument("--top-p", type=float, default=1.0, help="sample from so much of the probability (default: 1)")
    texts.add_argument(
        "--min-p", type=float, default=0.0, help="sample from tokens with this share of the highest (default: 0, all)"
    )
    texts.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1, tokens of prompt and text come less (default: 1)",
    )
    texts.add_argument("--seed", type=int, default=0, help="of the first text; the next ones count on (default: 0)")
    texts.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    texts.add_argument("--ignore-eod", action="store_true", help="go on after a token that ends a text")
    add_memory_options(parser)


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Add in how much memory texts are continued."""
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--prefill-chunk", type=int, default=8192, metavar="TOKENS", help="read so many at once (default: 8192)"
    )
    memory.add_argument("--num-blocks", type=int, help="blocks of the cache (default: by --memory-fraction)")
    memory.add_argument(
        "--memory-fraction",
        type=float,
        default=0.9,
        help="share of the GPU, or of the free memory of a machine without one, that may be filled (default: 0.9)",
    )


def sampling_params(args: argparse.Namespace, ends: EndTokens) -> SamplingParams:
    """What ``args`` ask for; what only one command offers has its default in the others.

    Raises:
        ValueError: a value outside its range, or a stop string that is no text.
    """
    from megatron_dmc.data.prompts import check_text
    from megatron_dmc.inference.sampling import SamplingParams

    for number, stop in enumerate(args.stop, start=1):
        check_text(stop, f"--stop number {number}")
    return SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        end_tokens=frozenset() if args.ignore_eod else ends.ids,
        stop=tuple(args.stop),
    )


def make_engine(
    args: argparse.Namespace,
    opened: OpenedModel,
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    least: int,
    max_sequences: int,
) -> Engine:
    """Compare what texts need with what there is, and load the model.

    Args:
        args: see :func:`add_text_options`.
        opened: the model.
        tokenizer: of the model.
        lengths: tokens of every text at its end, at most.
        least: tokens of one text that must fit, with the compression that is expected.
        max_sequences: texts in the cache at once.

    Raises:
        ValueError: it does not fit, or a size out of range.
    """
    from megatron_dmc.inference.engine import Engine

    sizes = {"max_sequences": max_sequences, "prefill_chunk": args.prefill_chunk, "num_blocks": args.num_blocks}
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    together = heapq.nlargest(max_sequences, (min(length, opened.max_tokens) for length in lengths))
    num_blocks = _num_blocks(args, opened, together, min(least, opened.max_tokens))
    return Engine(
        opened.load(),
        decode=tokenizer.decode,
        max_sequences=len(together),
        block_size=opened.block_size,
        num_blocks=num_blocks,
        prefill_tokens=args.prefill_chunk,
        kv_dtype=opened.kv_format.name,
    )


def _num_blocks(args: argparse.Namespace, opened: OpenedModel, together: Sequence[int], least: int) -> int:
    """The size of the cache that ``args`` ask for, if it fits, or that there is memory for, over all ranks."""
    from megatron_dmc.inference.memory_need import Need

    memory, there_is, parallel = opened.memory, opened.device_memory, opened.parallel
    # Every rank samples from the logits of all.
    workspace = memory.workspace(min(args.prefill_chunk, sum(together)), parallel.size * len(together))
    if args.num_blocks is None:
        mine = parallel.least(memory.num_blocks(workspace, together, least, there_is, args.memory_fraction))
        cache = min(memory.pool(mine, len(together)), memory.cache(together))
    else:
        mine = args.num_blocks // parallel.size
        cache = memory.pool(mine, len(together))
    remedy = "lower --num-blocks, --max-sequences or --prefill-chunk, or take --dtype bfloat16"
    print(Need(memory.weights, cache, workspace).require(there_is, remedy), file=sys.stderr)
    return parallel.size * mine if args.num_blocks is None else args.num_blocks


def say_what_was_taken(args: argparse.Namespace, tokenizer: Tokenizer, ends: EndTokens) -> None:
    """Name tokenizer and end tokens on stderr."""

    def shown(ids: Iterable[int]) -> str:
        return ", ".join(f"{tokenizer.token(number)} ({number})" for number in ids) or "nothing"

    ends_at = "nothing (--ignore-eod)" if args.ignore_eod else f"{shown(sorted(ends.ids))}, from {ends.stated_by}"
    print(f"tokenizer {tokenizer.path}: a prompt begins with {shown(tokenizer.first)}", file=sys.stderr)
    print(f"a text ends at {ends_at}", file=sys.stderr)

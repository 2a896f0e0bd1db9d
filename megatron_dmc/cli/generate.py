"""``megatron-dmc generate``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.cli.model_options import add_model_options, open_model, open_tokenizer
from megatron_dmc.cli.ranks import on_all_ranks

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.data.tokenizer.end_tokens import EndTokens
    from megatron_dmc.inference.cache.usage import CacheUsage
    from megatron_dmc.inference.decoder.parallel import TensorParallel
    from megatron_dmc.inference.request import Request

PROMPTS_FILE = 'one prompt per line; with the suffix .jsonl one object {"prompt": ...} per line'
DESCRIPTION = """Continues prompts and prints what the cache held beside what an uncompressed one would hold.
A prompt begins with what the tokenizer puts first, unless it begins so itself. A text ends at every eos_token_id of the
model's generation_config.json, or else of its config.json, and always at the tokenizer's end-of-document token."""


def add_parser(subparsers: Any) -> None:
    """Add the command ``generate``."""
    parser = subparsers.add_parser(
        "generate",
        help="text with the compressed cache",
        description=DESCRIPTION,
    )
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (repeatable)")
    prompts.add_argument("--prompts-file", type=Path, metavar="FILE", help=PROMPTS_FILE)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per text at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from so much of the probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on (default: 0)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after a token that ends a text")
    parser.add_argument("--max-sequences", type=int, default=32, help="texts in the cache at once (default: 32)")
    parser.add_argument("--num-blocks", type=int, help="size of the cache in blocks (default: it grows)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print texts and cache; on all ranks that torchrun started."""
    with on_all_ranks() as parallel:
        return _run(args, parallel)


def _run(args: argparse.Namespace, parallel: TensorParallel) -> int:
    from megatron_dmc.data.tokenizer.end_tokens import end_tokens
    from megatron_dmc.inference.cache.usage import CacheUsage
    from megatron_dmc.inference.engine import Engine
    from megatron_dmc.support.files import to_json

    prompts = _prompts(args)
    model, companions = open_model(args, parallel)
    tokenizer = open_tokenizer(args, companions, model.config.vocab_size)
    ends = end_tokens(companions, tokenizer)
    requests = _requests(args, prompts, tokenizer, ends)
    engine = Engine(model, max_sequences=args.max_sequences, block_size=args.block_size, num_blocks=args.num_blocks)
    _say_what_was_taken(args, tokenizer, ends)
    _generate(engine, requests)
    for request in requests:
        if request.usage is not None:
            request.usage = CacheUsage.of_ranks(parallel.all_objects(request.usage))
    failed = [request for request in requests if request.error]
    if len(failed) == len(requests):
        raise ValueError(failed[0].error)
    texts = _texts(requests, tokenizer)
    usage = CacheUsage.total([request.usage for request in requests if request.usage is not None])
    if args.json:
        print(to_json(_result(args, zip(prompts, texts, requests, strict=True), tokenizer, ends, usage), indent=2))
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(prompt + text, end="\n\n")
        print(usage.summary())
    if failed:
        raise ValueError(f"{len(failed)} of {len(requests)} prompts failed: {failed[0].error}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    from megatron_dmc.data.prompts import check_text, read_prompts

    if args.prompt is None:
        return read_prompts(args.prompts_file)
    for number, prompt in enumerate(args.prompt, start=1):
        check_text(prompt, f"--prompt number {number}")
    return args.prompt


def _requests(args: argparse.Namespace, prompts: list[str], tokenizer: Tokenizer, ends: EndTokens) -> list[Request]:
    from megatron_dmc.inference.request import Request
    from megatron_dmc.inference.sampling import SamplingParams

    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        end_tokens=frozenset() if args.ignore_eod else ends.ids,
    )
    return [
        Request(tokenizer.encode_prompt(prompt), dataclasses.replace(sampling, seed=args.seed + index))
        for index, prompt in enumerate(prompts)
    ]


def _say_what_was_taken(args: argparse.Namespace, tokenizer: Tokenizer, ends: EndTokens) -> None:
    def shown(ids: Iterable[int]) -> str:
        return ", ".join(f"{tokenizer.token(number)} ({number})" for number in ids) or "nothing"

    ends_at = "nothing (--ignore-eod)" if args.ignore_eod else f"{shown(sorted(ends.ids))}, from {ends.stated_by}"
    print(f"tokenizer {tokenizer.path}: a prompt begins with {shown(tokenizer.first)}", file=sys.stderr)
    print(f"a text ends at {ends_at}", file=sys.stderr)


def _texts(requests: list[Request], tokenizer: Tokenizer) -> list[str]:
    """Each continuation as it stands behind its prompt; says which ids have no text."""
    from megatron_dmc.data.tokenizer.incremental import continuation

    unknown = sorted({number for request in requests for number in request.output if tokenizer.token(number) is None})
    if unknown:
        print(f"left out of the texts: {unknown}, which {tokenizer.path} does not have", file=sys.stderr)
    return [continuation(tokenizer.decode, request.prompt, request.output) for request in requests]


def _result(
    args: argparse.Namespace,
    answers: Iterable[tuple[str, str, Request]],
    tokenizer: Tokenizer,
    ends: EndTokens,
    usage: CacheUsage,
) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "model": str(args.model),
        "tokenizer": {"file": str(tokenizer.path), "first_tokens": tokenizer.first},
        "end_tokens": {"ids": [] if args.ignore_eod else sorted(ends.ids), "stated_by": ends.stated_by},
        "results": [
            {
                "prompt": prompt,
                "text": text,
                "tokens": request.output,
                "finish_reason": request.finish_reason,
                "error": request.error or None,
                "cache": request.usage.to_dict() if request.usage else None,
            }
            for prompt, text, request in answers
        ],
        "cache": usage.to_dict(),
    }


def _generate(engine: Any, requests: list[Request]) -> None:
    """Run the engine, with progress."""
    from megatron_dmc.support.progress import progress

    engine.submit(requests)
    total = sum(request.sampling.max_new_tokens for request in requests)
    with progress("generating", total, "tokens") as advance:
        done = 0
        while engine.is_busy:
            engine.step()
            now = sum(request.progress for request in requests)
            advance(now - done)
            done = now

"""``megatron-dmc generate``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.cli.model_options import add_model_options, open_model, open_tokenizer

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.inference.request import Request


def add_parser(subparsers: Any) -> None:
    """Add the command ``generate``."""
    parser = subparsers.add_parser(
        "generate",
        help="text with the compressed cache",
        description="Continues prompts and prints what the cache held beside what an uncompressed one would hold.",
    )
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (repeatable)")
    prompts.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens per text at most (default: 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from so much of the probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt; the next ones count on (default: 0)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after an end-of-document token")
    parser.add_argument("--max-sequences", type=int, default=32, help="texts in the cache at once (default: 32)")
    parser.add_argument("--num-blocks", type=int, help="size of the cache in blocks (default: it grows)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print texts and cache."""
    from megatron_dmc.inference.cache.usage import CacheUsage
    from megatron_dmc.inference.engine import Engine

    texts = _prompts(args)
    model, companions = open_model(args)
    tokenizer = open_tokenizer(args, companions, model.config.vocab_size)
    requests = _requests(args, texts, tokenizer)
    engine = Engine(model, max_sequences=args.max_sequences, block_size=args.block_size, num_blocks=args.num_blocks)
    _generate(engine, requests)
    failed = [request for request in requests if request.error]
    if len(failed) == len(requests):
        raise ValueError(failed[0].error)
    usage = CacheUsage.total([request.usage for request in requests if request.usage is not None])
    if args.json:
        results = [
            {
                "prompt": text,
                "text": tokenizer.decode(request.output),
                "tokens": request.output,
                "finish_reason": request.finish_reason,
                "error": request.error or None,
                "cache": request.usage.to_dict() if request.usage else None,
            }
            for text, request in zip(texts, requests, strict=True)
        ]
        print(json.dumps({"model": str(args.model), "results": results, "cache": usage.to_dict()}, indent=2))
    else:
        for text, request in zip(texts, requests, strict=True):
            print(text + tokenizer.decode(request.output), end="\n\n")
        print(usage.summary())
    if failed:
        raise ValueError(f"{len(failed)} of {len(requests)} prompts failed: {failed[0].error}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt is not None:
        return args.prompt
    if not args.prompts_file.is_file():
        raise ValueError(f"{args.prompts_file} is missing: give a file with one prompt per line, or --prompt")
    lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{args.prompts_file} holds no prompt: give at least one line of text")
    return prompts


def _requests(args: argparse.Namespace, texts: list[str], tokenizer: Tokenizer) -> list[Request]:
    from megatron_dmc.inference.request import Request
    from megatron_dmc.inference.sampling import SamplingParams

    sampling = SamplingParams(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        eod=None if args.ignore_eod else tokenizer.eod,
    )
    return [
        Request(tokenizer.encode_prompt(text), dataclasses.replace(sampling, seed=args.seed + index))
        for index, text in enumerate(texts)
    ]


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

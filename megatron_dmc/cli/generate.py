"""``megatron-dmc generate``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.cli.model_options import OpenedModel, add_model_options, open_model, open_tokenizer
from megatron_dmc.cli.ranks import on_all_ranks
from megatron_dmc.cli.text_options import add_text_options, make_engine, sampling_params, say_what_was_taken

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.data.tokenizer.end_tokens import EndTokens
    from megatron_dmc.inference.decoder.parallel import TensorParallel
    from megatron_dmc.inference.engine import Engine
    from megatron_dmc.inference.request import Request

PROMPTS_FILE = 'one prompt per line; with the suffix .jsonl one object {"prompt": ...} per line'
MAX_SAMPLES = 1024
DESCRIPTION = """Continues prompts and prints what the cache held beside what an uncompressed one would hold, and how
fast it went. One prompt is streamed to a terminal. A prompt begins with what the tokenizer puts first, unless it begins
so itself. A text ends at every eos_token_id of the model's generation_config.json, or else of its config.json, and
always at the tokenizer's end-of-document token."""


def add_parser(subparsers: Any) -> None:
    """Add the command ``generate``."""
    parser = subparsers.add_parser("generate", help="text with the compressed cache", description=DESCRIPTION)
    add_model_options(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue (repeatable)")
    prompts.add_argument("--prompts-file", type=Path, metavar="FILE", help=PROMPTS_FILE)
    parser.add_argument("--n", type=int, default=1, help="texts per prompt, which is read once (default: 1)")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="with --json: log-probabilities of every token and the K most likely"
    )
    parser.add_argument("--prompt-logprobs", action="store_true", help="those of the prompt too")
    parser.add_argument("--max-sequences", type=int, default=32, help="texts in the cache at once (default: 32)")
    add_text_options(parser, max_new_tokens=128)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue the prompts and print texts and cache; on all ranks that torchrun started."""
    with on_all_ranks() as parallel:
        return _run(args, parallel)


def _run(args: argparse.Namespace, parallel: TensorParallel) -> int:
    from megatron_dmc.data.tokenizer.end_tokens import end_tokens
    from megatron_dmc.inference.cache.usage import CacheUsage
    from megatron_dmc.support.files import to_json

    prompts = [prompt for prompt in _prompts(args) for _ in range(args.n)]
    opened = open_model(args, parallel)
    tokenizer = open_tokenizer(args, opened)
    ends = end_tokens(opened.source.companions, tokenizer)
    requests = _requests(args, prompts, opened, tokenizer, ends)
    engine = _engine(args, opened, tokenizer, _good(requests))
    say_what_was_taken(args, tokenizer, ends)
    streams = sys.stdout.isatty() and len(requests) == 1 and not args.json
    _generate(engine, _good(requests), prompts[0] if streams else None)
    _good(requests)
    for request in requests:
        if request.usage is not None:
            request.usage = CacheUsage.of_ranks(parallel.all_objects(request.usage))
    _name_tokens_without_text(requests, tokenizer)
    usage = CacheUsage.total([request.usage for request in requests if request.usage is not None])
    if args.json:
        result = _result(args, zip(prompts, requests, strict=True), tokenizer, ends)
        print(to_json({**result, "cache": usage.to_dict(), "speed": engine.speed.to_dict()}, indent=2))
    else:
        for prompt, request in zip(prompts, requests, strict=True):
            print("" if streams else prompt + request.text, end="\n\n")
        print(usage.summary())
        print(engine.speed.summary(), file=sys.stderr)
    failed = [request for request in requests if request.error]
    if failed:
        raise ValueError(f"{len(failed)} of {len(requests)} texts failed: {failed[0].error}")
    return 0


def _prompts(args: argparse.Namespace) -> list[str]:
    from megatron_dmc.data.prompts import check_text, read_prompts

    if not 1 <= args.n <= MAX_SAMPLES:
        raise ValueError(f"n={args.n}: must be in 1..{MAX_SAMPLES} texts per prompt")
    if args.prompt is None:
        return read_prompts(args.prompts_file)
    for number, prompt in enumerate(args.prompt, start=1):
        check_text(prompt, f"--prompt number {number}")
    return args.prompt


def _requests(
    args: argparse.Namespace, prompts: Sequence[str], opened: OpenedModel, tokenizer: Tokenizer, ends: EndTokens
) -> list[Request]:
    """One for every text; those of one prompt are samples of it. Those that the model cannot read have failed."""
    from megatron_dmc.inference.request import Request, check_request

    sampling = dataclasses.replace(
        sampling_params(args, ends), logprobs=args.logprobs, prompt_logprobs=args.prompt_logprobs
    )
    requests: list[Request] = []
    for index in range(0, len(prompts), args.n):
        ids = tokenizer.encode_prompt(prompts[index])
        samples = Request(ids, dataclasses.replace(sampling, seed=args.seed + index)).samples(args.n)
        try:
            check_request(index // args.n, samples[0], opened.source.config)
        except ValueError as error:
            for sample in samples:
                sample.fail(str(error))
        requests += samples
    return requests


def _good(requests: list[Request]) -> list[Request]:
    """Requests that have not failed. Raises ``ValueError`` where all have."""
    good = [request for request in requests if not request.error]
    if not good:
        raise ValueError(requests[0].error)
    return good


def _engine(args: argparse.Namespace, opened: OpenedModel, tokenizer: Tokenizer, requests: list[Request]) -> Engine:
    """For these requests; more samples of a prompt add what they write."""
    new = args.max_new_tokens
    return make_engine(
        args,
        opened,
        tokenizer,
        lengths=[(new if one.source else len(one.prompt) + new) for one in requests],
        least=max(len(one.prompt) + new for one in requests),
        max_sequences=args.max_sequences,
    )


def _generate(engine: Engine, requests: list[Request], prompt: str | None) -> None:
    """Run the engine: text as it comes after ``prompt``, or else progress."""
    from megatron_dmc.support.progress import progress

    if prompt is not None:
        print(prompt, end="", flush=True)
        requests[0].on_text = lambda piece: print(piece, end="", flush=True)
        engine.submit(requests)
        while engine.is_busy:
            engine.step()
        return
    engine.submit(requests)
    total = sum(request.sampling.max_new_tokens for request in requests)
    with progress("generating", total, "tokens") as advance:
        done = 0
        while engine.is_busy:
            engine.step()
            now = sum(request.progress for request in requests)
            advance(now - done)
            done = now


def _name_tokens_without_text(requests: list[Request], tokenizer: Tokenizer) -> None:
    unknown = sorted({number for request in requests for number in request.output if tokenizer.token(number) is None})
    if unknown:
        print(f"left out of the texts: {unknown}, which {tokenizer.path} does not have", file=sys.stderr)


def _result(
    args: argparse.Namespace, answers: Iterable[tuple[str, Request]], tokenizer: Tokenizer, ends: EndTokens
) -> dict[str, Any]:
    """What ``--json`` prints beside the sums over all texts."""
    return {
        "model": str(args.model),
        "tokenizer": {"file": str(tokenizer.path), "first_tokens": tokenizer.first},
        "end_tokens": {"ids": [] if args.ignore_eod else sorted(ends.ids), "stated_by": ends.stated_by},
        "results": [_answer(prompt, request) for prompt, request in answers],
    }


def _answer(prompt: str, request: Request) -> dict[str, Any]:
    """One text; log-probabilities where they were asked for."""
    answer: dict[str, Any] = {
        "prompt": prompt,
        "text": request.text,
        "tokens": request.output,
        "seed": request.sampling.seed,
        "finish_reason": request.finish_reason,
        "error": request.error or None,
        "cache": request.usage.to_dict() if request.usage else None,
    }
    if request.sampling.logprobs is not None:
        answer["logprobs"] = [one.to_dict() for one in request.logprobs]
    if request.sampling.prompt_logprobs:
        answer["prompt_logprobs"] = [one.to_dict() for one in request.prompt_logprobs]
    return answer

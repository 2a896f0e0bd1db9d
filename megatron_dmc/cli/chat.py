"""``megatron-dmc chat``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

from megatron_dmc.cli.model_options import OpenedModel, add_model_options, open_model, open_tokenizer
from megatron_dmc.cli.text_options import add_text_options, make_engine, sampling_params, say_what_was_taken

if TYPE_CHECKING:
    from megatron_dmc.data.tokenizer import Tokenizer
    from megatron_dmc.data.tokenizer.chat_template import ChatTemplate
    from megatron_dmc.inference.conversation import Conversation
    from megatron_dmc.inference.engine import Engine
    from megatron_dmc.inference.request import Request
    from megatron_dmc.inference.sampling import SamplingParams
    from megatron_dmc.inference.speed import Speed

DESCRIPTION = """Keeps a conversation, by the chat template of the model's tokenizer: one line of input is one turn.
What was said stays in the compressed cache, so that a turn reads only what it adds. After each answer stands what the
cache holds, and how fast it went. Ctrl-C stops an answer, Ctrl-D ends."""


def add_parser(subparsers: Any) -> None:
    """Add the command ``chat``."""
    parser = subparsers.add_parser("chat", help="a conversation with the compressed cache", description=DESCRIPTION)
    add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first (default: by its template)")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja template (default: beside the tokenizer)"
    )
    add_text_options(parser, max_new_tokens=512)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer turns until the input ends."""
    from megatron_dmc.data.prompts import check_text
    from megatron_dmc.data.tokenizer.end_tokens import end_tokens
    from megatron_dmc.inference.conversation import Conversation

    if args.system is not None:
        check_text(args.system, "--system")
    opened = open_model(args)
    tokenizer = open_tokenizer(args, opened)
    template = _template(args, opened, tokenizer)
    ends = end_tokens(opened.source.companions, tokenizer)
    sampling = sampling_params(args, ends)
    engine = make_engine(
        args,
        opened,
        tokenizer,
        lengths=[opened.max_tokens],
        least=args.max_new_tokens,
        max_sequences=1,
    )
    say_what_was_taken(args, tokenizer, ends)
    conversation = Conversation(engine, tokenizer, template, args.system)
    for number, text in enumerate(_turns(), start=1):
        request, speed = _answer(engine, conversation, text, sampling, streams=not args.json)
        _report(args, number, text, request, speed)
    return 0


def _template(args: argparse.Namespace, opened: OpenedModel, tokenizer: Tokenizer) -> ChatTemplate:
    from megatron_dmc.data.tokenizer.chat_template import read_chat_template, template_file

    if args.chat_template is not None:
        return template_file(args.chat_template, tokenizer.path.parent)
    return read_chat_template(tokenizer.path.parent, opened.source.companions)


def _turns() -> Iterator[str]:
    """Lines of the standard input that are not empty; a terminal is asked for them."""
    from megatron_dmc.data.prompts import check_text

    is_asked = sys.stdin.isatty()
    while True:
        try:
            line = input("> ") if is_asked else sys.stdin.readline()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            if not is_asked:
                raise
            print("\n(Ctrl-D ends the conversation)", file=sys.stderr)
            continue
        except UnicodeDecodeError as error:
            raise ValueError(f"the input is not UTF-8 text: {error}") from error
        if not line and not is_asked:
            return
        if line.strip():
            check_text(line, "the input")
            yield line.removesuffix("\n")


def _answer(
    engine: Engine, conversation: Conversation, text: str, sampling: SamplingParams, *, streams: bool
) -> tuple[Request, Speed]:
    """One turn, and how fast it went; Ctrl-C ends the answer where it is."""
    from megatron_dmc.inference.speed import Speed

    engine.speed = speed = Speed()
    shown = 0

    def show(piece: str) -> None:
        nonlocal shown
        shown += len(piece)
        print(piece, end="", flush=True)

    with _Interrupt() as interrupt:
        request = conversation.ask(text, sampling, show if streams else None)
        while engine.is_busy:
            engine.step()
            if interrupt.came:
                engine.abort(request)
    if streams:
        print(request.text[shown:])
    conversation.finish(request)
    return request, speed


class _Interrupt:
    """Ctrl-C is noted instead of raised; a second one is raised."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


def _report(args: argparse.Namespace, number: int, text: str, request: Request, speed: Speed) -> None:
    """What the cache holds after a turn, and how fast it went."""
    from megatron_dmc.support.files import to_json

    if not args.json:
        lines = [request.usage.summary()] if request.usage else []
        print(*lines, speed.summary(), sep="\n", file=sys.stderr, flush=True)
        return
    line = {
        "turn": number,
        "user": text,
        "text": request.text,
        "tokens": request.output,
        "finish_reason": request.finish_reason,
        "cache": request.usage.to_dict() if request.usage else None,
        "speed": speed.to_dict(),
    }
    print(to_json(line), flush=True)

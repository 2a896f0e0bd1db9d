"""The program ``megatron-dmc``: arguments in, one call, an exit code out.

A command is a module of this package with ``add_parser(subparsers)`` and ``run(args) -> int``. Building the parser
imports neither torch nor Megatron; a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_dmc.support.errors import (
    EXIT_CHECK_FAILED,
    EXIT_INFRASTRUCTURE,
    EXIT_USER_ERROR,
    CheckFailed,
    InfrastructureError,
)
from megatron_dmc.support.threads import wait_briefly

COMMANDS = ("quickstart", "doctor", "data", "convert", "train", "evaluate", "eval", "generate", "chat", "report")
EXIT_INTERRUPTED = 130
_WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """An argument parser whose usage errors exit with 1 (the user can fix them) and that guesses no option names."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            # The first of the ranks that torchrun started says the same.
            self.exit(EXIT_USER_ERROR)
        self.print_usage(sys.stderr)
        self.exit(EXIT_USER_ERROR, f"{self.prog}: error: {message}\n")


def build_parser() -> Parser:
    """The parser of all commands."""
    from megatron_dmc import __version__

    parser = Parser(
        prog="megatron-dmc",
        description="Retrofit Llama with Dynamic Memory Compression: learned compression of the key-value cache.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-dmc {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        importlib.import_module(f"megatron_dmc.cli.{command}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 user error, 2 a check failed, 64 and up infrastructure)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _print_any_text()
    wait_briefly()
    try:
        args = build_parser().parse_args(arguments)
        return args.run(args)
    except (ValueError, OverflowError, ImportError) as error:
        return _fail(error, EXIT_USER_ERROR)
    except CheckFailed as error:
        return _fail(error, EXIT_CHECK_FAILED)
    except InfrastructureError as error:
        return _fail(error, EXIT_INFRASTRUCTURE)
    except BrokenPipeError:
        # The reader went away (megatron-dmc ... | head): nothing to tell, and nothing may be flushed any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER_ERROR
    except OSError as error:
        return _fail(error, EXIT_USER_ERROR if isinstance(error, _WRONG_PATHS) else EXIT_INFRASTRUCTURE)
    except MemoryError as error:
        return _fail(f"memory is full {error}".rstrip(), EXIT_INFRASTRUCTURE)
    except KeyboardInterrupt:
        print("\nmegatron-dmc: interrupted; the same command continues where this one stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _print_any_text() -> None:
    """A character that the terminal's encoding lacks becomes a question mark, instead of the loss of the text."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(error: Exception | str, code: int) -> int:
    print(f"megatron-dmc: {error}", *getattr(error, "__notes__", ()), sep="\n", file=sys.stderr)
    return code

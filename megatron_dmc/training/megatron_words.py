"""What Megatron raises, as one message: its own words, where they come from, and what to change.

Megatron checks flags by assertions, many without a text, and meets wrong input as whatever the line raises that
stumbles over it. Nobody who runs a stage needs the way through its code; it is kept in the log of the stage.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_dmc.runs.layout import LOG_FILE
from megatron_dmc.support.errors import CheckFailed, InfrastructureError

USAGE_ERROR = 2
"""Exit status of argparse."""
WORDS_LIMIT = 600
REMEDIES = (
    (
        r"OptimizerParamScheduler: class input value",
        "give the learning rate, its schedule, the batch size and the length that the stage began with, or "
        "--override-opt_param-scheduler to go on with these",
    ),
    (
        r"Parameter group key definition",
        "the optimizer began with other numbers: give the learning rate and weight decay that it began with",
    ),
    (
        r"world size .* is not divisible|world_size .* is not divisible",
        "the product of --tensor-model-parallel-size, --pipeline-model-parallel-size and --context-parallel-size must "
        "divide the number of ranks that were started",
    ),
    (
        r"global batch size .* (is not|must be) divisible|divisible by micro",
        "--global-batch-size must be a multiple of --micro-batch-size times the data-parallel ranks",
    ),
    (
        r"out of memory",
        "a smaller --micro-batch-size, --recompute-granularity full, or more ranks per copy of the model",
    ),
    (r"unrecognized arguments", "`megatron-dmc train --help` lists ours; the others are Megatron's"),
)
_ELSE = "change or leave out what it speaks of"
_OWN_FAULTS = (CheckFailed, InfrastructureError)


@contextlib.contextmanager
def refused_flags(add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> Iterator[None]:
    """Turn what Megatron's parser and checks of flags say into one ``ValueError``.

    Args:
        add_arguments: adds our flags; for the nearest one to a flag that nobody knows.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as left:
        if left.code != USAGE_ERROR:
            raise
        words = said.getvalue().strip().rpartition(": error: ")[2]
        said = io.StringIO()
        raise ValueError(f"Megatron refuses these flags: {words}; {_nearest(words, add_arguments)}") from None
    except Exception as error:
        raise failure(error, "refuses these flags") from error
    finally:
        sys.stderr.write(said.getvalue())


def failure(error: Exception, what: str, *, started: bool = False) -> Exception:
    """The exception of this package for one that Megatron raised; our own stay as they are.

    Args:
        error: as it was raised.
        what: Megatron did then.
        started: steps were done: no flag is at fault any more.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = "megatron_dmc" in Path(frame.filename).parts and "site-packages" not in Path(frame.filename).parts
    if isinstance(error, _OWN_FAULTS) or (ours and isinstance(error, ValueError)):
        return error
    words = _words(error, frame)
    if started or _is_of_the_machine(error):
        return InfrastructureError(f"Megatron {what}: {words}")
    return ValueError(f"Megatron {what}: {words}; {_remedy(words)}")


def keep_traceback(error: Exception, save: str) -> Path:
    """Append the way to ``error`` to the log of the stage in ``save``; the path of the log."""
    log = Path(save, LOG_FILE)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as stream:
        stream.writelines(traceback.format_exception(error))
    return log


def _words(error: Exception, frame: traceback.FrameSummary) -> str:
    """What an exception says; an assertion without a text, the line that asserts."""
    text = str(error).strip() or frame.line or ""
    kind = "" if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__}: "
    short = text if len(text) <= WORDS_LIMIT else text[:WORDS_LIMIT] + "..."
    return f"{kind}{short} ({_place(frame)})"


def _place(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}"


def _is_of_the_machine(error: Exception) -> bool:
    """A disk, a network or a rank failed, not the request."""
    import torch

    missing = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    return isinstance(error, (OSError, torch.distributed.DistError)) and not isinstance(error, missing)


def _remedy(words: str) -> str:
    return next((remedy for pattern, remedy in REMEDIES if re.search(pattern, words, re.IGNORECASE)), _ELSE)


def _nearest(words: str, add_arguments: Callable[[argparse.ArgumentParser], argparse.ArgumentParser]) -> str:
    """The flags that the unknown ones may have meant."""
    if not words.startswith("unrecognized arguments"):
        return _remedy(words)
    from megatron.training.arguments import add_megatron_arguments

    unknown = re.findall(r"--[\w-]+", words)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known = [*add_arguments(add_megatron_arguments(parser))._option_string_actions]
    meant = [match for flag in unknown for match in difflib.get_close_matches(flag, known, n=1, cutoff=0.8)]
    return f"did you mean {', '.join(meant)}?" if meant else _remedy(words)

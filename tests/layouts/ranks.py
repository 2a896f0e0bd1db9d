"""Runs a function on several ranks: processes forked from a server that has imported torch and Megatron once.

A fork takes milliseconds where a start takes ten seconds, and every case begins in a clean interpreter: Megatron's
global state, process groups and random numbers of one case cannot reach the next. The test process itself imports
neither torch's redirection nor Megatron.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_SECONDS = 240
LOG_TAIL_CHARACTERS = 2000

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.layouts.engine"])


class RanksFailedError(Exception):
    """A rank raised, or did not answer in time; the text holds its traceback and the end of its log."""


def run_ranks(function: Callable[..., Any], ranks: int, log_directory: Path, *args: Any, **kwargs: Any) -> list[Any]:
    """Call ``function(*args, **kwargs)`` on every rank at once and return its answers in the order of ranks.

    Args:
        function: importable by name, as are its arguments and answers picklable; tensors travel as numpy arrays.
        ranks: number of processes.
        log_directory: receives ``rank<r>.log``, what each rank printed.

    Raises:
        RanksFailedError: a rank raised or did not answer within ``TIMEOUT_SECONDS``.
    """
    log_directory.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    ends, processes = [], []
    for rank in range(ranks):
        ours, theirs = _context.Pipe(duplex=False)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        log = log_directory / f"rank{rank}.log"
        process = _context.Process(target=_serve, args=(function, args, kwargs, environment, log, theirs))
        process.start()
        theirs.close()
        ends.append(ours)
        processes.append(process)
    try:
        return _collect(ends, log_directory)
    finally:
        for process in processes:
            _end(process)


def _end(process: Any) -> None:
    """End a rank and what it started: Megatron keeps a process for writing checkpoints."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _collect(ends: list[Any], log_directory: Path) -> list[Any]:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    answers: dict[int, Any] = {}
    while len(answers) < len(ends):
        waiting = [end for rank, end in enumerate(ends) if rank not in answers]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RanksFailedError(f"{_logs(log_directory)}\nno answer in {TIMEOUT_SECONDS} s")
        for end in ready:
            try:
                succeeded, answer = end.recv()
            except EOFError:
                succeeded, answer = False, "the process ended without an answer"
            rank = ends.index(end)
            if not succeeded:
                raise RanksFailedError(f"{_logs(log_directory)}\nrank {rank}: {answer}")
            answers[rank] = answer
    return [answers[rank] for rank in range(len(ends))]


def _logs(directory: Path) -> str:
    tails = []
    for log in sorted(directory.glob("rank*.log")):
        tails.append(f"--- {log.name}\n" + log.read_text(errors="replace")[-LOG_TAIL_CHARACTERS:])
    return "\n".join(tails)


def _free_port() -> int:
    """A port that nothing listens on, below those from which the system serves outgoing connections.

    One of the latter may be taken by a rank of another case before the first rank of this one binds it.
    """
    while True:
        port = random.randint(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _serve(function: Any, args: Any, kwargs: Any, environment: dict[str, str], log: Path, connection: Any) -> None:
    """One rank: the body of the forked process."""
    os.setsid()
    os.environ.update(environment)
    stream = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    try:
        answer = (True, function(*args, **kwargs))
    except BaseException:
        answer = (False, traceback.format_exc())
    sys.stdout.flush()
    connection.send(answer)
    connection.close()
    # Process groups of a rank whose partner failed would wait for it at exit.
    os._exit(0)

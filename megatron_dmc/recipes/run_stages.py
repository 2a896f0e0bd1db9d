"""Runs stages as ``megatron-dmc train`` does for everyone, each in a process of its own, and shows their progress."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.runs.layout import LOG_FILE, stage_directory
from megatron_dmc.runs.metrics import steps_logged
from megatron_dmc.support.errors import EXIT_UNFINISHED, EXIT_USER_ERROR, InfrastructureError
from megatron_dmc.support.progress import progress

LINES_TO_SHOW = 12
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_LEAVE = 10


@dataclass(frozen=True)
class StageRun:
    """One stage to train.

    Attributes:
        flags: of ``megatron-dmc train``, without ``--save``.
        directory: of its checkpoints, metrics and log.
        steps: its length.
    """

    flags: Sequence[str]
    directory: Path
    steps: int

    @property
    def steps_done(self) -> int:
        """Steps logged so far."""
        return steps_logged(self.directory)


def run_stages(stages: Sequence[StageRun]) -> None:
    """Train stages side by side to their ends; one that has a checkpoint continues from there.

    Raises:
        ValueError: a training refused its flags or input.
        InfrastructureError: one was interrupted, or ended in another way than finishing.
    """
    done, total = _steps_done(stages), max(stage.steps for stage in stages)
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(_started(stage, len(stages))) for stage in stages]
        advance = stack.enter_context(progress(f"training {_names(stages)}", total, "steps", done=done))
        codes: list[int | None] = [None]
        # One that failed ends the others, with the block.
        while None in codes and not any(codes):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            now = _steps_done(stages)
            advance(max(0, now - done))
            done = max(done, now)
            codes = [process.poll() for process in processes]
    for stage, code in zip(stages, codes, strict=True):
        if code:
            _fail(code, stage.directory / LOG_FILE)


def _steps_done(stages: Sequence[StageRun]) -> int:
    """Steps that all stages have done: they run side by side, and the work ends with the slowest."""
    return min(stage.steps_done for stage in stages)


def _names(stages: Sequence[StageRun]) -> str:
    names = [stage.directory.name for stage in stages]
    controlled = len(names) == 2 and names[1] == stage_directory(names[0], control=True)
    return f"{names[0]} and its control" if controlled else " and ".join(names)


@contextlib.contextmanager
def _started(stage: StageRun, neighbours: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that trains ``stage`` with its share of the cores, and does not outlive the block."""
    stage.directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "megatron_dmc", "train", *stage.flags, "--save", str(stage.directory)]
    threads = max(1, len(os.sched_getaffinity(0)) // neighbours)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with (
        open(stage.directory / LOG_FILE, "a", encoding="utf-8") as log,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        try:
            yield process
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(SECONDS_TO_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()


def _fail(code: int, log: Path) -> None:
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_TO_SHOW:]
    if code == EXIT_USER_ERROR and last and last[-1].startswith("megatron-dmc: "):
        raise ValueError(last[-1].removeprefix("megatron-dmc: "))
    if code == EXIT_UNFINISHED:
        raise InfrastructureError(f"training in {log.parent} was interrupted: the same command continues")
    raise InfrastructureError(f"training ended with exit code {code}; the end of {log}:\n" + "\n".join(last))

"""Runs one stage as ``megatron-dmc train`` does for everyone, in a process of its own, and shows its progress."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_dmc.errors import EXIT_USER_ERROR, InfrastructureError
from megatron_dmc.progress import progress
from megatron_dmc.report.metrics import METRICS_FILE

LOG_FILE = "train.log"
LINES_TO_SHOW = 12
SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_LEAVE = 10


def run_stage(flags: Sequence[str], directory: Path, steps: int) -> None:
    """Train to the end of the stage; where ``directory`` holds a checkpoint of it, continue from there.

    Args:
        flags: of ``megatron-dmc train``, without ``--save``.
        directory: of its checkpoints, metrics and log.
        steps: length of the stage, for the progress.

    Raises:
        ValueError: the training refused its flags or input.
        InfrastructureError: it ended in another way than finishing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metrics = directory / METRICS_FILE
    done = _lines(metrics)
    command = [sys.executable, "-m", "megatron_dmc", "train", *flags, "--save", str(directory)]
    with (
        open(directory / LOG_FILE, "a", encoding="utf-8") as log,
        progress(f"training {directory.name}", steps, "steps", done=done) as advance,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                advance(max(0, (now := _lines(metrics)) - done))
                done = max(done, now)
        except BaseException:
            _end(process)
            raise
    if process.returncode:
        _fail(process.returncode, directory / LOG_FILE)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(SECONDS_TO_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()


def _fail(code: int, log: Path) -> None:
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_TO_SHOW:]
    if code == EXIT_USER_ERROR and last and last[-1].startswith("megatron-dmc: "):
        raise ValueError(last[-1].removeprefix("megatron-dmc: "))
    raise InfrastructureError(f"training ended with exit code {code}; the end of {log}:\n" + "\n".join(last))

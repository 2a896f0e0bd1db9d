"""Runs programs that a model wrote, in processes with limits.

A generated program may do anything that its user may. It runs in a process of its own, in an empty folder that is
removed, without the user's environment, with limits on time, memory, files and processes, and, where the kernel lets a
user make one, in a network namespace without a network. That keeps accidents in, not an attacker: use a machine that
you can lose.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

PROGRAM, ERRORS, REACHED = "program.py", "errors", "reached"
LIMITED = """
import json, os, resource, sys
for kind, value in json.loads(sys.argv[1]).items():
    resource.setrlimit(getattr(resource, kind), (value, value))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Takes limits upon itself and becomes the program: no code of ours runs between
fork and exec, where threads forbid it."""
LONGEST_REASON = 200


@dataclass(frozen=True)
class Limits:
    """Of one program."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    processes: int = 0
    """That it may start; root is not bound by it."""

    def to_json(self) -> str:
        """Names of the system's limits, and their values."""
        values = {
            "RLIMIT_CPU": math.ceil(self.seconds) + 1,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_CORE": 0,
        }
        return json.dumps(values)


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """What became of one program."""

    passed: bool
    reason: str
    """``passed``, ``timed out``, or the last line of its error."""


def run_program(source: str, limits: Limits = DEFAULT_LIMITS) -> Outcome:
    """Run a program in Python without packages. It passes if it comes to its end: leaving early with 0 does not do.

    Args:
        source: of the program.
        limits: that it has.
    """
    end = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="program_") as folder:
        (Path(folder) / PROGRAM).write_text(f"{source}\nopen({REACHED!r}, 'w').write({end!r})\n", encoding="utf-8")
        # Into a file, whose size is limited: a pipe would let a program fill our memory.
        with (Path(folder) / ERRORS).open("w+b") as errors:
            status = _run(folder, errors, limits)
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        reached = Path(folder) / REACHED
        if status == 0 and reached.is_file() and reached.read_bytes() == end.encode():
            return Outcome(True, "passed")
    if status is None:
        return Outcome(False, "timed out")
    return Outcome(False, lines[-1][:LONGEST_REASON] if lines else f"ended early with status {status}")


def _run(folder: str, errors: BinaryIO, limits: Limits) -> int | None:
    """The exit status; None: it took too long. What it started and left running is ended too."""
    python = [sys.executable, "-I", "-S", "-B"]
    process = subprocess.Popen(
        [*_without_network(), *python, "-c", LIMITED, limits.to_json(), *python, PROGRAM],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
    )
    try:
        return process.wait(limits.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def isolation() -> str:
    """Whether programs run without a network here, in words."""
    return "no network" if _without_network() else "network not taken away: the system does not let a user do so"


@cache
def _without_network() -> tuple[str, ...]:
    """The command that takes the network away; empty where the system does not allow it."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    words = (unshare, "--user", "--map-root-user", "--net")
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if tried.returncode == 0 else ()

"""What every benchmark shares: rows, the machine they were measured on, time and peak memory of two sides.

Two sides are timed in turns in one process, and each side's peak memory is that of a fresh process.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.support.files import write_json

PACKAGES = ("megatron-dmc", "torch", "megatron-core", "transformers", "triton", "numpy")
PACKAGES += ("flashinfer-python", "flash-attn-3", "fa3-fwd")

SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
"""A real model's shape, as transformers' ``LlamaConfig`` takes it, for random weights."""


@dataclass(frozen=True)
class Row:
    """One figure. ``goal`` is the largest value allowed, where an issue names one; ``met`` follows from it."""

    name: str
    value: float
    unit: str
    conditions: Mapping[str, Any]
    goal: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None without a goal."""
        return None if self.goal is None else self.value <= self.goal

    def to_dict(self) -> dict[str, Any]:
        """The row as the result files hold it."""
        return {**dataclasses.asdict(self), "conditions": dict(self.conditions), "met": self.met}


def timed(runs: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each run, ``repeats`` times in turns after one warm-up turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(seconds: Mapping[str, Sequence[float]], above: str, below: str) -> float:
    """Median over the turns of the ratio of two sides: what slows both sides of a turn cancels."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))


def synchronize(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()


def growth_exponent(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Least-squares slope of log value over log length."""
    x = torch.tensor(lengths, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def last_line_of_new_process(module: str, arguments: Sequence[str], **environment: str) -> str:
    """The last line that ``python -m module arguments`` prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def peak_bytes_in_new_process(module: str, arguments: Sequence[str]) -> int:
    """Peak memory of a module that calls :func:`print_peak_bytes`, as the operating system saw it."""
    # Freed blocks go back to the system at once, so that the peak is what was in use at one time.
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return int(last_line_of_new_process(module, arguments, **at_once))


def print_peak_bytes(prepare: Callable[[], Callable[[], object]], warm_up: Callable[[], object]) -> None:
    """Print the most memory that ``prepare`` (inputs) and the run it returns hold, beyond a process after warm-up."""
    warm_up()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark (proc(5))
    before = _status_bytes("VmRSS")
    prepare()()
    print(_status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": models[0].split(":")[1].strip() if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load_average": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": versions,
    }


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that all benchmarks share."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="write machine, versions and rows to this file")


def report(rows: Iterable[Row], output: Path | None) -> None:
    """Print rows as they come, and write all so far after each: an interrupted run leaves what it measured."""
    rows_done: list[dict[str, Any]] = []
    before = machine()
    for row in rows:
        goal = "" if row.goal is None else f"  goal {row.goal:g}: {'met' if row.met else 'MISSED'}"
        conditions = " ".join(f"{name}={value}" for name, value in row.conditions.items())
        print(f"{row.name:46} {row.value:10.4g} {row.unit:6} {conditions}{goal}", flush=True)
        rows_done.append(row.to_dict())
        if output is not None:
            write_json(output, {"machine": before, "rows": rows_done})

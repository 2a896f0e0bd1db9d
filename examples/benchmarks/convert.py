"""Conversion of random Llama checkpoints, beside a plain copy: ``python -m examples.benchmarks.convert --json OUT``.

A 7B model in bfloat16 (13.5 GB), and a 70B one on its true widths with two layers, are written to a scratch folder,
converted both ways with SHA-256 and without the comparison, each step in a new process and from a cold cache; the
comparison has rows of its own. Where the disk has less than 60 GB free the 7B model has fewer layers and says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.hf_writer import write_weights
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from checkpoints_convert.sizes import conversion_bytes, largest_layer_bytes, megatron_bytes, weight_bytes
from checkpoints_convert.verify import verify
from examples.benchmarks.measure import Row, add_output_argument, report
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape, padded_vocab_size
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.tensors import Entry
from megatron_dmc.support.files import sync_file, write_json

LLAMA2_7B = ModelConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096)
LLAMA2_70B = ModelConfig(8192, 80, 64, 8, 128, 28672, 32000, 4096)
WIDE_LAYERS = 2
DISK_BYTES = 60_000_000_000
COPIES_ON_DISK = 3.2
"""Source, Megatron checkpoint and export at one time, with some room."""
RANDOM_ELEMENTS = 1 << 28

GIB = 1 << 30
PEAK_GOAL_GIB = 4.0
TIME_GOAL = 2.0
"""A conversion may take twice as long as a plain copy: half its speed."""

_UNVERIFIED = Options(verify=False)
STEPS: dict[str, Callable[[Path, Path], Any]] = {
    "import": lambda source, target: import_checkpoint(source, target, options=_UNVERIFIED),
    "export": lambda source, target: export_checkpoint(source, target, options=_UNVERIFIED),
    "verify": verify,
}


def main() -> int:
    """Run the benchmark, or one step of it in the process that was started for it."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.convert", description=__doc__.split(":")[0])
    add_output_argument(parser)
    parser.add_argument("--scratch", type=Path, help="folder for the checkpoints (default: the system's)")
    parser.add_argument(
        "--layers", type=int, default=LLAMA2_7B.num_layers, help="of the 7B model (default: %(default)s)"
    )
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        print(json.dumps(_run_step(options.step, *options.paths)))
        return 0
    with tempfile.TemporaryDirectory(prefix="convert_benchmark_", dir=options.scratch) as folder:
        report(_rows(Path(folder), options.layers), options.json)
    return 0


def _rows(folder: Path, layers: int) -> Iterator[Row]:
    free = shutil.disk_usage(folder).free
    if free < DISK_BYTES:
        per_layer = weight_bytes(LLAMA2_7B) / LLAMA2_7B.num_layers
        layers = min(layers, max(1, int(free / COPIES_ON_DISK / per_layer) - 2))
    seven = dataclasses.replace(LLAMA2_7B, num_layers=layers)
    yield from _model_rows(folder, seven, "7B widths", with_goals=True)
    wide = dataclasses.replace(LLAMA2_70B, num_layers=WIDE_LAYERS)
    yield from _model_rows(folder, wide, "70B widths", with_goals=False)
    whole = MegatronShape(LLAMA2_70B, padded_vocab_size(LLAMA2_70B.vocab_size))
    conditions = {"model": "70B, all 80 layers", "source": "plan of --dry-run"}
    yield Row("bytes written", megatron_bytes(whole) / 1e9, "GB", conditions)
    yield Row(
        "peak memory of a conversion", conversion_bytes(whole) / GIB, "GiB", conditions, _memory_limit(LLAMA2_70B)
    )


def _model_rows(folder: Path, config: ModelConfig, name: str, *, with_goals: bool) -> Iterator[Row]:
    source, megatron, back = (folder / part for part in ("source", "megatron", "back"))
    _write_random(source, config)
    size = weight_bytes(config)
    conditions = {"model": name, "layers": config.num_layers, "dtype": config.dtype, "GB": round(size / 1e9, 2)}
    for step, (start, target) in {"import": (source, megatron), "export": (megatron, back)}.items():
        copied = _seconds_of_copy(source, folder / "copy")
        measured = _in_new_process(step, start, target)
        goal = TIME_GOAL if with_goals else None
        yield Row(f"{step}: speed of the plain copy", size / copied / 1e9, "GB/s", conditions)
        yield Row(f"{step}: speed", size / measured["seconds"] / 1e9, "GB/s", conditions)
        yield Row(f"{step}: time relative to the copy", measured["seconds"] / copied, "x", conditions, goal)
        peak = measured["peak_bytes"] / GIB
        limit = min(PEAK_GOAL_GIB, _memory_limit(config)) if with_goals else _memory_limit(config)
        yield Row(f"{step}: peak memory", peak, "GiB", conditions, limit)
    shutil.rmtree(back)
    measured = _in_new_process("verify", source, megatron)
    yield Row("verify: time", measured["seconds"], "s", conditions)
    yield Row("verify: peak memory", measured["peak_bytes"] / GIB, "GiB", conditions)
    yield Row("verify: largest process of a forward pass", measured["child_bytes"] / GIB, "GiB", conditions)
    shutil.rmtree(source)
    shutil.rmtree(megatron)


def _memory_limit(config: ModelConfig) -> float:
    """Twice the largest layer plus 1 GiB, in GiB."""
    return 2 * largest_layer_bytes(config) / GIB + 1


def _write_random(directory: Path, config: ModelConfig) -> None:
    """A Hugging Face directory whose tensors are slices of one block of random numbers."""
    directory.mkdir()
    block = torch.empty(RANDOM_ELEMENTS, dtype=torch.bfloat16)
    block.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(0))
    start = 0

    def parts(entry: Entry) -> Iterator[torch.Tensor]:
        nonlocal start
        for shape in entry.hf_shapes(config):
            count = torch.Size(shape).numel()
            start = (start + 1_000_003) % (RANDOM_ELEMENTS - count)
            yield block[start : start + count].view(shape)

    write_weights(directory, config, lambda entry: list(parts(entry)))
    write_json(directory / "config.json", to_hf_config(config))


def _seconds_of_copy(source: Path, target: Path) -> float:
    _leave_cache(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        sync_file(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def _in_new_process(step: str, source: Path, target: Path) -> dict[str, float]:
    _leave_cache(source)
    command = [sys.executable, "-m", "examples.benchmarks.convert", "--step", step, str(source), str(target)]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def _run_step(step: str, source: Path, target: Path) -> dict[str, float]:
    """Seconds of a step and the peak of this process's anonymous and shared memory."""
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    STEPS[step](source, target)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak, "child_bytes": children}


def _anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("RssAnon", "RssShmem"))


def _leave_cache(directory: Path) -> None:
    """Make the next reader wait for the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())

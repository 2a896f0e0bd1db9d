"""A training step beside one of transformers: ``python -m examples.benchmarks.training_transformers --json OUT``.

The same model, one sequence, a whole step on the CPU; the sides run in two processes and take turns, so that what else
the machine does slows both. Without ``--model`` it is one of SmolLM2-135M's shape with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.options import Options
from examples.benchmarks.measure import SMOLLM2_135M, Row, add_output_argument, median_ratio, report
from examples.benchmarks.training_sides import CLIP, LEARNING_RATE
from megatron_dmc.data.indexed import IndexedWriter
from megatron_dmc.models.hugging_face import read_config_json

STAGES = ("off", "zero_out", "retrofit")
DTYPES = ("float32", "bfloat16")
WARM_UP = 2
GOAL = 1.1


def main() -> int:
    """Measure every stage in every type."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmarks.training_transformers", description=__doc__.split(":")[0]
    )
    add_output_argument(parser)
    parser.add_argument("--model", type=Path, metavar="DIR", help="Hugging Face directory")
    parser.add_argument("--sequence-length", type=int, default=1024, help="tokens of a step (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default: %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report(rows(options, Path(scratch)), options.json)
    return 0


def rows(options: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    """Seconds of both sides and their ratio."""
    model = options.model or _write_model(scratch / "model")
    import_checkpoint(model, scratch / "off", options=Options(verify=False))
    _write_data(scratch / "data", read_config_json(model)["vocab_size"], options)
    if "retrofit" in options.stages:
        _run_zero_out(scratch, options.sequence_length)
    for dtype in options.dtypes:
        for stage in options.stages:
            seconds = _seconds(_sides(scratch, model, stage, dtype, options), options.repeats)
            conditions = {"stage": stage, "dtype": dtype, "length": options.sequence_length}
            for side, values in seconds.items():
                yield Row(f"training step, {side}: time", statistics.median(values), "s", conditions)
            ratio = median_ratio(seconds, "megatron_dmc", "transformers")
            yield Row("training step, megatron_dmc / transformers: time", ratio, "ratio", conditions, GOAL)


def _write_model(directory: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SMOLLM2_135M)).save_pretrained(directory)
    return directory


def _write_data(prefix: Path, vocab_size: int, options: argparse.Namespace) -> None:
    """Random tokens for every step of a run."""
    tokens = (WARM_UP + options.repeats + 1) * (options.sequence_length + 1)
    with IndexedWriter(prefix, vocab_size) as writer:
        writer.add(np.random.default_rng(0).integers(0, vocab_size, size=tokens))


def _run_zero_out(scratch: Path, length: int) -> None:
    """The checkpoint that ``retrofit`` starts from."""
    flags = [*_flags(scratch, "zero_out", "off", length, 1), "--save", str(scratch / "zero_out"), "--no-save-optim"]
    with open(scratch / "zero_out.log", "w", encoding="utf-8") as log:
        subprocess.run([sys.executable, "-m", "megatron_dmc", "train", *flags], stdout=log, stderr=log, check=True)


def _flags(scratch: Path, stage: str, base: str, length: int, steps: int) -> list[str]:
    flags = {
        "--dmc-stage": stage,
        "--pretrained-checkpoint": scratch / base,
        "--train-data-path": scratch / "data",
        "--data-cache-path": scratch / "cache",
        "--seq-length": length,
        "--micro-batch-size": 1,
        "--global-batch-size": 1,
        "--train-iters": steps,
        "--lr": LEARNING_RATE,
        "--clip-grad": CLIP,
    }
    return [str(part) for pair in flags.items() for part in pair]


def _sides(scratch: Path, model: Path, stage: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of each side."""
    length, steps = options.sequence_length, WARM_UP + options.repeats
    base = "zero_out" if stage == "retrofit" else "off"
    flags = _flags(scratch, stage, base, length, steps) + ["--bf16"] * (dtype == "bfloat16")
    theirs = {"model": str(model), "dtype": dtype, "length": length, "steps": steps}
    return {"megatron_dmc": {"flags": flags}, "transformers": theirs}


def _seconds(sides: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side's steps, taken in turns; those of the warm-up are left out."""
    with contextlib.ExitStack() as stack:
        steps = {name: stack.enter_context(_started(name, arguments)) for name, arguments in sides.items()}
        turns = [{name: step() for name, step in steps.items()} for _ in range(WARM_UP + repeats)]
    return {name: [turn[name] for turn in turns[WARM_UP:]] for name in sides}


@contextlib.contextmanager
def _started(side: str, arguments: dict[str, Any]) -> Iterator[Callable[[], float]]:
    """A process of one side, and what makes it take a step."""
    command = [sys.executable, "-m", "examples.benchmarks.training_sides", side, json.dumps(arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        ask, answers = process.stdin, process.stdout

        def step() -> float:
            with contextlib.suppress(BrokenPipeError):
                ask.write("\n")
                ask.flush()
            answer = answers.readline()
            if not answer:
                process.wait()
                log.seek(0)
                raise RuntimeError(f"{side} ended before its steps:\n{log.read()}")
            return float(answer)

        try:
            yield step
        finally:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())

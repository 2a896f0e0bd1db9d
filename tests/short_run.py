"""A few steps of a stage, through the product's own entry, on documents that are all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dmc.data.indexed import IndexedWriter
from tests.layouts.ranks import run_ranks

NUM_DOCUMENTS = 40


def write_data(directory: Path, tokens: Sequence[int], vocab_size: int) -> None:
    """``directory/data``: documents of the length that :func:`train_stage` reads, so that all sequences are equal."""
    with IndexedWriter(directory / "data", vocab_size) as writer:
        for _ in range(NUM_DOCUMENTS):
            writer.add(np.array(tokens))


def train(argv: list[str]) -> Any:
    """As ``probe.train``. Only ranks may load Megatron."""
    from tests.layouts import probe

    return probe.train(argv)


def train_stage(
    directory: Path,
    stage: str,
    base: str,
    steps: int,
    *,
    seq_length: int,
    ranks: int = 1,
    function: Callable[..., Any] = train,
    **flags: object,
) -> list[dict[str, float]]:
    """Train ``directory/base`` on :func:`write_data`'s documents and save it as ``directory/stage``.

    Args:
        directory: holds the base, the data and what is saved.
        stage, steps: of the run.
        seq_length: tokens of a document.
        ranks: processes.
        function: what every rank runs.
        **flags: of ``megatron-dmc train``; an empty string makes a switch, None takes a usual flag away.

    Returns:
        The logged values of every step.
    """
    usual = {
        "dmc_stage": stage,
        "pretrained_checkpoint": directory / base,
        "save": directory / stage,
        "data_path": directory / "data",
        "data_cache_path": directory / "cache",
        "dmc_total_samples": 16,
        "seq_length": seq_length,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "train_iters": steps,
        "save_interval": steps,
        "split": "100,0,0",
        "eval_iters": 0,
        "log_interval": 1,
    }
    merged = {"--" + name.replace("_", "-"): str(value) for name, value in (usual | flags).items() if value is not None}
    argv = [part for flag in merged.items() for part in flag if part]
    records = run_ranks(function, ranks, directory / f"logs_{stage}_{ranks}", argv)
    return next(record.steps for record in records if record.steps)

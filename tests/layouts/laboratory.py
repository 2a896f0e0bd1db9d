"""Trains the small model in any layout: data, starting checkpoints and single-rank runs are made once and kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_dmc.data.indexed import IndexedWriter
from megatron_dmc.stages import find_stage
from tests.layouts import probe
from tests.layouts.ranks import run_ranks
from tests.layouts.whole_run import WholeRun, assemble

VOCAB_SIZE = 120
SEQUENCE_LENGTH = 32
NUM_LAYERS = 4

DECISION_BIAS = 1.0
BORROWED_ROW_SCALE = 5.0
"""Together they put about a third of the decision logits above zero; bias 5 and trained-size rows would put none."""

TARGET_CR = 1.635
"""Asks for an accumulate fraction of 0.388: in the first batch of every variant sequences lie below and above it."""

_MODEL = {
    "num_layers": NUM_LAYERS,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 96,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "vocab_size": VOCAB_SIZE,
    "init_method_std": 0.08,
}

_RUN = {
    "seq_length": SEQUENCE_LENGTH,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    # One order of the data, however long a run is.
    "dmc_total_samples": 160,
    "lr": 3e-5,
    "min_lr": 3e-5,
    "lr_decay_style": "constant",
    "tokenizer_type": "NullTokenizer",
    "split": "100,0,0",
    "eval_iters": 0,
    "log_interval": 1,
    "save_interval": 1000,
}


@dataclass(frozen=True)
class Variant:
    """A model and what is trained, apart from the layout.

    Attributes:
        model: flags of the model that differ from the usual one; each set has a checkpoint of its own.
        run: flags of the run, all stages but the making of the checkpoint.
        tied: embedding and output layer share their weight.
        stage: of the run; the checkpoint is of the stage before.
        method: flags of the method, of the run and of its checkpoint.
        is_taught: learns from the plain model of the same shape.
        target_cr: ratio asked for; see ``TARGET_CR``.
    """

    model: tuple[tuple[str, object], ...] = ()
    run: tuple[str, ...] = ()
    tied: bool = False
    stage: str = "consolidate"
    method: tuple[str, ...] = ()
    is_taught: bool = False
    target_cr: float = TARGET_CR

    @property
    def base(self) -> Variant:
        """What the checkpoint is made of that the run starts from."""
        before = find_stage(self.stage).starts_from("adapter" not in self.method)[0]
        return dataclasses.replace(self, run=(), stage=before, is_taught=False)

    @property
    def plain(self) -> Variant:
        """The model before its retrofit."""
        return Variant(self.model, tied=self.tied, stage="off")


class Laboratory:
    """Runs in one directory.

    Args:
        directory: empty; receives data, checkpoints and the logs of all ranks.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._data = _write_data(directory / "data")
        self._numbers = itertools.count()
        self._base_of = functools.cache(self._make_base)
        self.reference = functools.cache(self._train_alone)

    def path(self, name: str) -> Path:
        """A path for a test of its own."""
        return self._directory / name

    def base(self, variant: Variant) -> Path:
        """The checkpoint that a variant starts from."""
        return self._base_of(variant.base)

    def start(self, variant: Variant) -> dict[str, Path]:
        """Flags of a variant's checkpoints: the one that it starts from, and its teacher's."""
        start = {"pretrained_checkpoint": self.base(variant)}
        return start | {"dmc_teacher": self._base_of(variant.plain)} if variant.is_taught else start

    def train(
        self, variant: Variant, ranks: int, switches: tuple[str, ...] = (), watched: int = 0, **flags: object
    ) -> WholeRun:
        """Train ``variant`` on ``ranks`` processes from its checkpoint.

        Args:
            variant: the model.
            ranks: number of processes.
            switches: flags of the layout.
            watched: step of this run whose gradients and decisions are kept.
            **flags: replace others.
        """
        argv = self.arguments(variant, switches, **self.start(variant) | flags)
        return assemble(self.run(probe.train, ranks, argv, watched=watched), VOCAB_SIZE)

    def run(self, function: Callable[..., Any], ranks: int, *args: Any, **kwargs: Any) -> list[Any]:
        """``run_ranks`` with a log directory of its own."""
        return run_ranks(function, ranks, self._new_path("logs"), *args, **kwargs)

    def arguments(self, variant: Variant, switches: tuple[str, ...] = (), **flags: object) -> list[str]:
        """All flags of a run."""
        ours = {
            "data_path": self._data,
            "data_cache_path": self._directory / "cache",
            "dmc_stage": variant.stage,
            "dmc_decision_bias": DECISION_BIAS,
            "dmc_target_cr": variant.target_cr,
        }
        merged = _MODEL | _RUN | dict(variant.model) | ours | flags
        argv = ["--group-query-attention"]
        if not variant.tied:
            argv.append("--untie-embeddings-and-output-weights")
        for name, value in merged.items():
            if value is not None:
                argv += ["--" + name.replace("_", "-"), str(value)]
        return [*argv, *variant.method, *variant.run, *switches]

    def _train_alone(self, variant: Variant, steps: int) -> WholeRun:
        return self.train(variant, ranks=1, train_iters=steps)

    def _make_base(self, base: Variant) -> Path:
        path = self._new_path("base")
        argv = self.arguments(base, save=path, train_iters=1, lr=0, min_lr=0)
        self.run(probe.make_base, 1, argv, spread=BORROWED_ROW_SCALE)
        return path

    def _new_path(self, kind: str) -> Path:
        return self._directory / f"{kind}{next(self._numbers)}"


def _write_data(prefix: Path, num_documents: int = 40) -> Path:
    """Documents of random tokens; each prefers a few of its own, so that sequences compress differently.

    They fill 30 sequences: every run passes several epochs, whose order must not depend on where it was resumed.
    """
    random = np.random.default_rng(7)
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for _ in range(num_documents):
            favourites = random.choice(VOCAB_SIZE - 1, size=6)
            length = int(random.integers(4, 40))
            anything = random.integers(0, VOCAB_SIZE - 1, size=length)
            tokens = np.where(random.random(length) < 0.7, random.choice(favourites, size=length), anything)
            writer.add(np.append(tokens, VOCAB_SIZE - 1))
    return prefix

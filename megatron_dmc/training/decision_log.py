"""Logs what every KV head decides while a stage trains: heads that collapse, or never merge, are seen early."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dmc.methods.decisions import Decisions
from megatron_dmc.runs.decisions import line
from megatron_dmc.runs.layout import DECISIONS_FOLDER
from megatron_dmc.runs.metrics import MetricsFile
from megatron_dmc.training.model.microbatch import Microbatch, Observer


class DecisionLog:
    """An observer of micro-batches: one line per step with the share of tokens that each head of this rank merged.

    Ranks that see other sequences with the same heads write nothing: the first of them stands for all.

    Args:
        save: directory of the stage's checkpoints.
    """

    def __init__(self, save: Path) -> None:
        self._save = save
        self._file: MetricsFile | None = None
        self._step: int | None = None
        self._shares: dict[int, tuple[int, list[Tensor]]] = {}

    def __call__(self, microbatch: Microbatch, layer_number: int, first_head: int, decisions: Decisions) -> None:
        """Take in one layer's decisions; a recomputed pass counts again and changes no mean."""
        if microbatch.sequence_B is None or parallel_state.get_data_parallel_rank(with_context_parallel=True):
            return
        if microbatch.step != self._step:
            self.write()
            self._step = microbatch.step
        share_G = decisions.fraction().detach().mean(dim=0)
        self._shares.setdefault(layer_number, (first_head, []))[1].append(share_G)

    def write(self) -> None:
        """Write the step so far; the last one of a run is complete when the run ends."""
        if not self._shares or self._step is None:
            return
        if self._file is None:
            name = f"rank_{torch.distributed.get_rank():04d}.jsonl"
            self._file = MetricsFile(self._save / DECISIONS_FOLDER, name)
        shares = {
            layer: (first_head, [round(share, 6) for share in torch.stack(found_G).mean(dim=0).tolist()])
            for layer, (first_head, found_G) in self._shares.items()
        }
        self._file.add(line(self._step + 1, shares))
        self._shares = {}


def both(first: Observer | None, second: Observer | None) -> Observer | None:
    """An observer that tells two; None where there is none."""
    if first is None or second is None:
        return first or second

    def tell(microbatch: Microbatch, layer_number: int, first_head: int, decisions: Decisions) -> None:
        first(microbatch, layer_number, first_head, decisions)
        second(microbatch, layer_number, first_head, decisions)

    return tell

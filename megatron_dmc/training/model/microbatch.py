"""What the attention layers of one forward pass need to know, and what they report.

Legend: B batch (sequences of this micro-batch on this rank), S sequence (local under context parallelism).

Megatron hands one argument of ours, ``attention_bias``, unchanged to every attention layer, through recompute and
offloading as well. A :class:`Microbatch` travels there. Layers report by layer number, so that the second forward pass
of a recomputed layer overwrites what the first one wrote.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_dmc.methods.decisions import Decisions
from megatron_dmc.ops.geometry import Geometry


@dataclass
class GradientScale:
    """The factor Megatron applies to the loss of a micro-batch before its backward pass.

    The schedule sets it after every forward pass, on every pipeline stage.
    """

    value: torch.Tensor | float = 1.0

    def set(self, value: torch.Tensor) -> None:
        """The hook that Megatron's schedule calls."""
        self.value = value


@dataclass
class Statistics:
    """What a forward pass decided, in counts.

    Attributes:
        decided_B: per layer number, the positive decisions of this rank's heads and positions.
        received_B: the sum over the layers of earlier pipeline stages.
        gate_B: 1 where the compression loss is open, known before the backward pass of this stage starts.
        fraction_B: share of positive decisions of each whole sequence; last pipeline stage only.
        cross_entropy_BS: LM loss of every token, where a teacher is learnt from instead; last pipeline stage only.
    """

    decided_B: dict[int, torch.Tensor] = field(default_factory=dict)
    received_B: torch.Tensor | None = None
    gate_B: torch.Tensor | None = None
    fraction_B: torch.Tensor | None = None
    cross_entropy_BS: torch.Tensor | None = None

    def total_B(self) -> torch.Tensor:
        """Positive decisions of this rank over the layers so far, this stage and the earlier ones (int64)."""
        total = torch.stack(list(self.decided_B.values())).sum(dim=0)
        return total if self.received_B is None else total + self.received_B


class Observer(Protocol):
    """Sees every layer's decisions of every micro-batch, in recomputed passes again."""

    def __call__(self, microbatch: Microbatch, layer_number: int, first_head: int, decisions: Decisions) -> None:
        """``first_head``: this rank's first KV head; ``decisions`` cover the whole sequence."""


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One forward pass: what goes in, and :class:`Statistics` of what comes out.

    Attributes:
        geometry: positions of this rank's queries, and of the keys of whole sequences.
        step: training step, a coordinate of the noise.
        sequence_B: int64 ordinals of the sequences in the order of the training data, coordinates of the noise;
            None = evaluation: hard decisions, no noise.
        target_fraction: share of positive decisions below which the compression loss of a sequence is open.
        neuron_scale: factor of the borrowed channel in stage ``zero_out``.
        gradient_scale: factor of the loss, known when the backward pass starts.
        is_teachers: nothing is decided and no channel fades: attention is that of the model before its retrofit.
        observer: told of every layer's decisions; None: nobody.
        statistics: filled in by the layers.
    """

    geometry: Geometry
    step: int = 0
    sequence_B: torch.Tensor | None = None
    target_fraction: float = 0.0
    neuron_scale: float = 1.0
    gradient_scale: GradientScale = field(default_factory=GradientScale)
    is_teachers: bool = False
    observer: Observer | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def for_teacher(self) -> Microbatch:
        """The same sequences, read by the teacher."""
        return dataclasses.replace(self, is_teachers=True, observer=None, statistics=Statistics())

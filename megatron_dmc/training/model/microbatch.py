"""What the attention layers of one forward pass need to know, and what they report.

Legend: B batch (sequences of this micro-batch on this rank).

Megatron hands one argument of ours, ``attention_bias``, unchanged to every attention layer, through recompute and
offloading as well. A :class:`Microbatch` travels there. Layers write into it by layer number, so that the second
forward pass of a recomputed layer overwrites what the first one wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


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
class Microbatch:
    """One forward pass.

    Attributes:
        sequence_length: positions of a whole sequence, over all context-parallel ranks.
        step: training step, a coordinate of the noise.
        sequence_B: int64 ordinals of the sequences in the order of the training data, coordinates of the noise;
            None = evaluation: hard decisions, no noise.
        target_fraction: accumulate fraction below which the compression loss of a sequence is open.
        neuron_scale: factor of the borrowed channel in stage ``zero_out``.
        documents: per row the ascending start positions of its documents; None = one document.
        gradient_scale: factor of the loss, known when the backward pass starts.
        accumulated_B: per layer number, the accumulating decisions of this rank's heads and positions.
        received_B: the sum over the layers of earlier pipeline stages.
        gate_B: 1 where the compression loss is open, known before the backward pass of this stage starts.
        fraction_B: share of accumulating decisions of each whole sequence; last pipeline stage only.
    """

    sequence_length: int
    step: int = 0
    sequence_B: torch.Tensor | None = None
    target_fraction: float = 0.0
    neuron_scale: float = 1.0
    documents: Sequence[Sequence[int]] | None = None
    gradient_scale: GradientScale = field(default_factory=GradientScale)
    accumulated_B: dict[int, torch.Tensor] = field(default_factory=dict)
    received_B: torch.Tensor | None = None
    gate_B: torch.Tensor | None = None
    fraction_B: torch.Tensor | None = None

    def accumulated_total_B(self) -> torch.Tensor:
        """Accumulating decisions of this rank over the layers so far, this stage and the earlier ones (int64)."""
        total = torch.stack(list(self.accumulated_B.values())).sum(dim=0)
        return total if self.received_B is None else total + self.received_B

"""One pass over new tokens of some sequences: what is the same in every layer.

Legend: T new tokens of all sequences, B sequences, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.eviction_window import Part
from megatron_dmc.ops.geometry import Geometry


class Ranks(NamedTuple):
    """How a layer's tensors are spread over ranks; by default they are not."""

    mean_over_heads: Callable[[Tensor], Tensor] = lambda x: x
    """Mean over tensor-parallel ranks, of a mean over this rank's heads: all that a method may ask of other ranks."""
    whole_sequence: Callable[[Tensor], Tensor] = lambda x: x
    """All positions in order, from those of this context-parallel rank."""


ALONE = Ranks()


@dataclass(frozen=True, eq=False)
class Step:
    """One pass over new tokens of some sequences, packed one sequence after the other.

    Args:
        rows: row of the cache of each sequence.
        positions: tokens of each sequence that were read before.
        counts: new tokens of each sequence, at least 1.
        inverse_frequencies: of the rotary angles, float32 [D/2].
        ends_prompt: whether these are the last tokens of every sequence's prompt, or later ones.
        ranks: how the heads are spread.
    """

    rows: Sequence[int]
    positions: Sequence[int]
    counts: Sequence[int]
    inverse_frequencies: Tensor
    ends_prompt: bool = True
    ranks: Ranks = ALONE

    @property
    def num_tokens(self) -> int:
        """New tokens T."""
        return sum(self.counts)

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one new token."""
        return max(self.counts) == 1

    @property
    def continues(self) -> bool:
        """Whether some sequence has tokens in the cache already."""
        return any(self.positions)

    @property
    def device(self) -> torch.device:
        """Of all tensors of the pass."""
        return self.inverse_frequencies.device

    @cached_property
    def rows_B(self) -> Tensor:
        """``rows``, int64."""
        return torch.tensor(self.rows, device=self.device)

    @cached_property
    def starts(self) -> list[int]:
        """Where the tokens of each sequence begin among the new ones."""
        starts, place = [], 0
        for count in self.counts:
            starts.append(place)
            place += count
        return starts

    @cached_property
    def last_B(self) -> Tensor:
        """int64: place of the last new token of each sequence."""
        return torch.tensor(self.starts, device=self.device) + torch.tensor(self.counts, device=self.device) - 1

    @cached_property
    def sequence_T(self) -> Tensor:
        """int64: which sequence each token belongs to."""
        counts_B = torch.tensor(self.counts, device=self.device)
        return torch.arange(len(self.counts), device=self.device).repeat_interleave(
            counts_B, output_size=sum(self.counts)
        )

    @cached_property
    def offset_T(self) -> Tensor:
        """int64: place of each token among the new ones of its sequence."""
        starts_B = torch.tensor(self.starts, device=self.device)
        return torch.arange(self.num_tokens, device=self.device) - starts_B[self.sequence_T]

    @cached_property
    def position_T(self) -> Tensor:
        """int64: position of each token in its sequence."""
        return torch.tensor(self.positions, device=self.device)[self.sequence_T] + self.offset_T

    @cached_property
    def part(self) -> Part:
        """The new tokens as a part of their texts."""
        position_B, count_B = (torch.tensor(numbers, device=self.device) for numbers in (self.positions, self.counts))
        return Part(position_B, count_B, self.sequence_T, self.offset_T, self.last_B)

    @cached_property
    def first_T(self) -> Tensor:
        """bool: whether a sequence begins with the token."""
        return self.position_T == 0

    @cached_property
    def geometry(self) -> Geometry:
        """The new tokens as one row, each sequence a document of it."""
        return Geometry(
            sum(self.counts), 1, self.inverse_frequencies, documents=[self.starts], position_S=self.position_T
        )


class Tokens(NamedTuple):
    """New tokens of one layer, before RoPE."""

    q_TND: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    step: Step
    adapter_TG: Tensor | None = None
    """Output of the model's adapter, before any factor or offset; None for a model without one."""

"""What a step of decoding reads in the books of a cache, for all layers at once. Reads nothing back, except on a CPU.

Legend: L layers, B sequences, G KV heads, M blocks per head cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.methods.step import Step
from megatron_dmc.ops.paged_attention import DecodePlan, entry_slots


class Tables(NamedTuple):
    """Block tables of some rows; as long as they stand, one step after the other uses them."""

    rows: tuple[int, ...]
    block_LBGM: Tensor
    plans: Sequence[DecodePlan] | None
    """How a CPU reads each layer."""


class Decoding(NamedTuple):
    """The head caches of a step of decoding, before it writes."""

    step: Step
    tables: Tables
    length_LBG: Tensor
    """int32 entries."""
    newest_slot_LBG: Tensor
    """int64 where in the flattened pool the newest entry lies; any number where there is none."""
    next_slot_LBG: Tensor
    """int64 where the one after it comes."""

    @classmethod
    def of(cls, step: Step, tables: Tables, length_LBG: Tensor, block_size: int) -> Decoding:
        """Find the two entries that a method like DMC may write."""
        newest_LBG = length_LBG.long() - 1
        place_LBG2 = torch.stack((newest_LBG.clamp(min=0), newest_LBG + 1), dim=-1)
        slot_LBG2 = entry_slots(tables.block_LBGM, place_LBG2, block_size)
        return cls(step, tables, length_LBG, *slot_LBG2.unbind(-1))

    def slots(self, layer: int, entry_BG: Tensor) -> Tensor:
        """int64 [B, G] where the newest entries, or those after them, lie."""
        appends_BG = entry_BG == self.length_LBG[layer]
        return torch.where(appends_BG, self.next_slot_LBG[layer], self.newest_slot_LBG[layer])

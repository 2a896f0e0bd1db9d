"""A policy of the tests: keep the first entries and the newest ones, drop what lies between.

Shapes: B sequences, G KV heads, E entries.
"""

from __future__ import annotations

import torch

from megatron_dmc.methods.base import Keep, Slot, Update
from megatron_dmc.methods.dense import Dense

FIRST = 4


class Newest(Dense):
    """The first four entries and the newest ``budget - 4``, whose slots form a ring. No training, no whole form."""

    name = "newest"
    compresses = True
    has_whole_form = False
    exact_recompute = False
    reads_parts = False
    only_newest_changes = False

    def __init__(self, budget: int) -> None:
        super().__init__()
        if budget <= FIRST:
            raise ValueError(f"budget={budget}: must be above {FIRST}")
        self.budget = budget

    def state(self, head_dim):
        """How many entries were overwritten: the ring's place."""
        return {"overwritten": Slot((), torch.int32)}

    def absorb(self, tokens, state, length_BG):
        """Append until the budget is reached, then overwrite the oldest entry of the ring."""
        update = super().absorb(tokens, state, length_BG)
        if not tokens.step.decodes:
            return update._replace(state=state)
        overwritten_BG = state["overwritten"]
        is_full_BG = length_BG >= self.budget
        oldest_BG = FIRST + overwritten_BG % (self.budget - FIRST)
        entry_BG = torch.where(is_full_BG, oldest_BG, length_BG).to(torch.int32)
        return Update(update.k_TGD, update.v_TGD, entry_BG, {"overwritten": overwritten_BG + is_full_BG.int()})

    def survivors(self, tokens, update, caches):
        """A prompt is read densely, then cut."""
        length_BG1 = caches.length_BG.long().unsqueeze(-1)
        if int(length_BG1.max()) <= self.budget:
            return None
        entry_E = torch.arange(self.budget)
        newest_BGE = length_BG1 - self.budget + entry_E
        is_cut_BG1 = length_BG1 > self.budget
        entry_BGE = torch.where(is_cut_BG1 & (entry_E >= FIRST), newest_BGE, entry_E.expand_as(newest_BGE))
        return Keep(entry_BGE, caches.length_BG.clamp(max=self.budget), update.state)

    def whole(self, *args, **kwargs):
        """There is none."""
        raise ValueError("newest decides token by token and has no whole form")

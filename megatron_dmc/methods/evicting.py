"""What policies share that keep a budget of entries and decide after each step which one leaves.

A prompt is read densely and then cut. From then on a head holds one entry more than its budget while it attends; the
one that leaves is overwritten by the next token. Positions are the original ones: keys were rotated when they came.

Shapes: T new tokens, B sequences, G KV heads, S tokens of a prompt, E entries.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dmc.methods.base import HeadCaches, Keep, Method, Slot, State, Update
from megatron_dmc.methods.dense import Dense
from megatron_dmc.methods.step import Tokens

VICTIM = "victim"
"""Place of the entry that the next token overwrites, once the budget is exceeded."""


class EvictingPolicy(Method):
    """A policy for any model, without training and without a form for whole sequences.

    Args:
        budget: entries per head that survive a step.

    Raises:
        ValueError: a budget below 2.
    """

    reads_parts = False
    num_recent = 0
    """Newest entries that never leave."""

    def __init__(self, budget: int) -> None:
        if budget < 2:
            raise ValueError(f"budget={budget}: {self.name} keeps at least 2 entries per head")
        self.budget = budget
        self._dense = Dense()

    def state(self, head_dim: int) -> Mapping[str, Slot]:
        """The next victim of every head."""
        return {VICTIM: Slot((), torch.int32)}

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """Append up to one entry above the budget, then overwrite the victim. Prompts append."""
        update = self._dense.absorb(tokens, state, length_BG)
        if not tokens.step.decodes:
            return update._replace(state=dict(state))
        entry_BG = torch.where(length_BG > self.budget, state[VICTIM], length_BG)
        return update._replace(entry_TG=entry_BG.to(torch.int32), state=dict(state))

    def expected_entries(self, num_tokens: int) -> float:
        """The budget, and one more while a token attends."""
        return min(num_tokens, self.budget + 1)

    def survivors(self, tokens: Tokens, update: Update, caches: HeadCaches) -> Keep | None:
        """Of a prompt the recent entries and those of the highest :meth:`prompt_scores`, in their order."""
        assert tokens.step.ends_prompt, f"{self.name} reads a prompt whole"
        entry_BGE = torch.zeros(*caches.length_BG.shape, self.budget, dtype=torch.int64, device=tokens.step.device)
        scores, kept = self.prompt_scores(tokens, update), []
        for row, score_GS in enumerate(scores):
            length = score_GS.shape[-1]
            ranked_GS = score_GS.clone()
            ranked_GS[:, length - min(self.num_recent, length) :] = torch.inf
            kept.append(ranked_GS.topk(min(length, self.budget), dim=-1).indices.sort(dim=-1).values)
            entry_BGE[row, :, : kept[-1].shape[-1]] = kept[-1]
        length_BG = caches.length_BG.clamp(max=self.budget)
        return Keep(entry_BGE, length_BG, self.state_after_prompt(update.state, scores, kept))

    def state_after_prompt(self, state: State, scores: list[Tensor], kept: list[Tensor]) -> State:
        """State of the entries that were kept: for every sequence their places in the prompt, int64 [G, E]."""
        return state

    @abstractmethod
    def prompt_scores(self, tokens: Tokens, update: Update) -> list[Tensor]:
        """For every sequence float32 [G, S]: besides the recent entries those with the highest survive its prompt."""

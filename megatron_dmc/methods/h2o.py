"""H2O: keep the newest entries, and of the others the heavy hitters, to which most attention was ever paid.

Source: arXiv 2306.14048. The score of an entry is the sum of its softmax weights over all queries since it came, the
prompt's included. Half of the budget is the newest entries, half the highest scores of the rest. Scores of what leaves
are forgotten. Each KV head keeps a set of its own; where it serves several query heads their weights are summed, which
is our convention (the authors' code has multi-head attention only).

What it is not: normalised by age, so that early entries are favoured, as in the authors' code.

Shapes: B sequences, G KV heads, R query heads per KV head, S tokens of a prompt, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_dmc.methods.base import HeadCaches, Slot, State, Update
from megatron_dmc.methods.evicting import VICTIM, EvictingPolicy
from megatron_dmc.methods.step import Tokens
from megatron_dmc.ops.attention_weights import decode_weights, prompt_weights

SCORE = "score"
POSITION = "position"


class H2O(EvictingPolicy):
    """See the module."""

    name = "h2o"

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.num_recent = budget // 2

    def state(self, head_dim: int) -> Mapping[str, Slot]:
        """The next victim, and for every place the score and the position of its entry."""
        places = (self.budget + 1,)
        return {**super().state(head_dim), SCORE: Slot(places), POSITION: Slot(places, torch.int64)}

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """As every policy of a budget; the new entry's score begins at 0."""
        update = super().absorb(tokens, state, length_BG)
        if not tokens.step.decodes:
            return update
        place_BG1 = update.entry_TG.long().unsqueeze(-1)
        position_BG1 = tokens.step.position_T.view(-1, 1, 1).expand_as(place_BG1)
        score = state[SCORE].scatter(-1, place_BG1, 0.0)
        position = state[POSITION].scatter(-1, place_BG1, position_BG1)
        return update._replace(state={**update.state, SCORE: score, POSITION: position})

    def observe(self, tokens: Tokens, update: Update, caches: HeadCaches) -> State:
        """Add the weights of this step, then choose among the entries that are not recent."""
        q_BND = self.rotated_queries(tokens)
        weights_BGRE = decode_weights(q_BND, caches.kv, caches.block_table_BGM, caches.length_BG)
        score_BGE = update.state[SCORE].clone()
        weight_BGE = weights_BGRE.sum(dim=2)[..., : score_BGE.shape[-1]]
        score_BGE[..., : weight_BGE.shape[-1]] += weight_BGE
        oldest_recent_B11 = tokens.step.position_T.view(-1, 1, 1) - self.num_recent + 1
        place_E = torch.arange(self.budget + 1, device=score_BGE.device)
        stays_BGE = (update.state[POSITION] >= oldest_recent_B11) | (place_E >= caches.length_BG.unsqueeze(-1))
        victim_BG = score_BGE.masked_fill(stays_BGE, torch.inf).argmin(dim=-1).to(torch.int32)
        return {VICTIM: victim_BG, SCORE: score_BGE, POSITION: update.state[POSITION]}

    def prompt_scores(self, tokens: Tokens, update: Update) -> list[Tensor]:
        """Summed weights of all queries."""
        weights = prompt_weights(self.rotated_queries(tokens), update.k_TGD, tokens.step.counts, last=False)
        return [weights_GRS.sum(dim=1) for weights_GRS in weights]

    def state_after_prompt(self, state: State, scores: list[Tensor], kept: list[Tensor]) -> State:
        """Scores and positions of the entries that were kept."""
        state = {name: tensor.clone() for name, tensor in state.items()}
        for row, (score_GS, kept_GE) in enumerate(zip(scores, kept, strict=True)):
            state[SCORE][row, :, : kept_GE.shape[-1]] = score_GS.gather(-1, kept_GE)
            state[POSITION][row, :, : kept_GE.shape[-1]] = kept_GE
        return state

"""TOVA: at every step the entry leaves to which the newest query pays the least attention.

Source: arXiv 2401.06104. One set of entries for a whole layer: weights are the mean over all query heads. No recent
window and no sinks are protected, the newest token itself may leave. A prompt is cut once, by its last query.

What it is not: learned, or per head. Under tensor parallelism the mean is taken over all ranks.

Shapes: B sequences, G KV heads, R query heads per KV head, S tokens of a prompt, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.methods.base import HeadCaches, State, Update
from megatron_dmc.methods.evicting import VICTIM, EvictingPolicy
from megatron_dmc.methods.step import Tokens
from megatron_dmc.ops.attention_weights import decode_weights, prompt_weights


class TOVA(EvictingPolicy):
    """See the module."""

    name = "tova"

    def observe(self, tokens: Tokens, update: Update, caches: HeadCaches) -> State:
        """The victim of the next step: the same place in every head."""
        q_BND = self.rotated_queries(tokens)
        weights_BGRE = decode_weights(q_BND, caches.kv, caches.block_table_BGM, caches.length_BG)
        mean_BE = tokens.step.ranks.mean_over_heads(weights_BGRE.mean(dim=(1, 2)))
        filled_BE = torch.arange(mean_BE.shape[-1], device=mean_BE.device) < caches.length_BG[:, :1]
        victim_B = mean_BE.masked_fill(~filled_BE, torch.inf).argmin(dim=-1)
        return {VICTIM: victim_B.to(torch.int32).unsqueeze(-1).expand_as(caches.length_BG)}

    def prompt_scores(self, tokens: Tokens, update: Update) -> list[Tensor]:
        """Mean weights of the last query, the same for every head."""
        q_TND = self.rotated_queries(tokens)
        weights = prompt_weights(q_TND, update.k_TGD, tokens.step.counts, last=True)
        mean_over_heads = tokens.step.ranks.mean_over_heads
        means = [mean_over_heads(weights_GRS.mean(dim=(0, 1))) for weights_GRS in weights]
        return [mean_S.expand(weights_GRS.shape[0], -1) for mean_S, weights_GRS in zip(means, weights, strict=True)]

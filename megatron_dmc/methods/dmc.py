"""Dynamic Memory Compression: each KV head decides for every token whether to merge it into its newest entry.

Source: [DMC] arXiv 2403.09636. Two forms of one function: with noise the relaxation that is trained (section 3.2),
without it hard decisions, which equal decoding token by token with the compressed cache. One decision rule,
:func:`decide`, serves training, evaluation, prompts and decoding.

``decisions_per="layer"`` is DMC-C, whose definition is ours: the decision logit of a layer is the mean over its KV
heads, the importance logit the mean over its query heads; every head follows it.

What it is not: an eviction policy. A merged token stays in the weighted mean of its entry, and only the newest entry of
a head ever changes.

Shapes: S positions, T new tokens (or queries), B sequences, N query heads, G KV heads (1 for logits of DMC-C), D head
dim, W window_size, K sums 2 D + 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods.base import ALONE, HeadCaches, Method, Ranks, Slot, State, Update, Whole
from megatron_dmc.methods.decisions import Decisions, NoiseSource
from megatron_dmc.methods.step import Step, Tokens
from megatron_dmc.ops import cache_update, decisions
from megatron_dmc.ops.borrowed import EVERY_HEAD
from megatron_dmc.ops.compressed_attention import Weights, attend_pooled, compressed_attention
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import HIDDEN

SEGMENT = "segment"
"""Name of the running sums of the open segment in the cache."""


def read_logits(q_SBND: Tensor, k_SBGD: Tensor, settings: DMCConfig, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Decision and importance logits, float32 [..., G], from queries [..., N, D] and keys [..., G, D] before RoPE.

    With one decision per layer [..., 1]: means over the heads of all ranks, which have equally many.
    """
    decision = decisions.decision_logits(k_SBGD, settings.decision_bias)
    importance = decisions.importance_logits(q_SBND, k_SBGD.shape[-2], settings.decision_bias)
    if settings.decisions_per == "layer":
        means = torch.cat([x.mean(-1, keepdim=True) for x in (decision, importance)], dim=-1)
        decision, importance = ranks.mean_over_heads(means).split(1, dim=-1)
    return decision, importance


def decide(
    decision_logits: Tensor,
    importance_logits: Tensor,
    first: Tensor,
    settings: DMCConfig,
    noise: Tensor | None = None,
) -> Decisions:
    """The decisions of :func:`read_logits`' logits [S, B, G], or [T, G] of packed tokens.

    Args:
        decision_logits, importance_logits: float32.
        first: bool without the last dimension, True where a sequence or document begins: that token appends.
        settings: of the method.
        noise: logistic, of the shape of the logits: the relaxation; None: hard decisions.

    Raises:
        ValueError: shapes that differ.
    """
    _check_shapes(decision_logits, importance_logits, noise, first)
    first = first.unsqueeze(-1)
    relaxed = None
    if noise is None:
        taken = decisions.hard_decisions(decision_logits, settings.decision_threshold)
        hard = taken & ~first
        alpha = hard.to(decision_logits.dtype)
        own_bias = HIDDEN * alpha
    else:
        logits = decisions.relaxed_logits(decision_logits, noise, settings.temperature)
        taken = decisions.hard_decisions(logits.detach(), 0.0)
        hard = taken & ~first
        relaxed = torch.sigmoid(logits)
        alpha = relaxed.masked_fill(first, 0.0)
        own_bias = F.logsigmoid(-logits).masked_fill(first, 0.0)
    omega = decisions.importance(importance_logits, settings.importance_epsilon)
    return Decisions(decision_logits, taken, hard, alpha, own_bias, omega, relaxed, noise)


class DMC(Method):
    """The compressed cache of a model that was retrofitted.

    Args:
        settings: of the model.
    """

    name = "dmc"
    neuron_scale = 0.0
    borrowed = EVERY_HEAD
    has_whole_form = True
    exact_recompute = True
    only_newest_changes = True
    updates_in_place = True

    def __init__(self, settings: DMCConfig) -> None:
        self.settings = settings
        self.merging = cache_update.Merging(
            settings.decision_bias, settings.decision_threshold, settings.importance_epsilon, settings.window_size
        )

    def state(self, head_dim: int) -> Mapping[str, Slot]:
        """Running sums of the open segment, float32: (K,), or with a window a ring (W, K)."""
        return {SEGMENT: Slot(cache_update.state_shape(head_dim, self.settings.window_size))}

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """Append or accumulate every token."""
        step, k_TGD, v_TGD = tokens.step, tokens.k_TGD, tokens.v_TGD
        logits = read_logits(tokens.q_TND, k_TGD, self.settings, step.ranks)
        decided = decide(*logits, step.first_T, self.settings).of_heads(k_TGD.shape[1])
        assert decided.omega is not None
        if step.decodes:
            segment, k_mean, v_mean = cache_update.update_segments(
                state[SEGMENT], k_TGD, v_TGD, decided.hard, decided.omega, step.position_T
            )
            entry_TG = length_BG - decided.hard.to(torch.int32)
        else:
            k_mean, v_mean, segment = cache_update.pool_chunks(
                state[SEGMENT] if step.continues else None,
                k_TGD,
                v_TGD,
                decided.hard,
                decided.omega,
                step.counts,
                step.positions,
                self.settings.window_size,
            )
            entry_TG = cache_update.entry_places(decided.hard, step.counts, length_BG)
        k_entry = self.rotated_keys(k_mean, step).to(k_TGD.dtype)
        return Update(k_entry, v_mean.to(v_TGD.dtype), entry_TG, {SEGMENT: segment}, decided)

    def expected_entries(self, num_tokens: int) -> float:
        """By the ratio that the model was trained for."""
        return num_tokens / self.settings.target_cr

    def shared_logits(self, q_TND: Tensor, k_TGD: Tensor) -> cache_update.Logits | None:
        """See :meth:`Method.shared_logits`; those of the layer in DMC-C."""
        if self.settings.decisions_per == "head":
            return None
        return cache_update.Logits(*read_logits(q_TND, k_TGD, self.settings))

    def attend_own(self, tokens: Tokens, update: Update) -> tuple[Tensor, Tensor]:
        """Over the entry of every position, hidden from those after the one that overwrites it."""
        assert update.decisions is not None
        q, k, v = (x.unsqueeze(1) for x in (tokens.q_TND, update.k_TGD, update.v_TGD))
        out_T1ND, lse_1NT = attend_pooled(q, k, v, update.decisions.key_bias.unsqueeze(1), tokens.step.geometry)
        return out_T1ND.squeeze(1).transpose(0, 1), lse_1NT[0]

    def visible_before(self, update: Update, caches: HeadCaches, step: Step) -> Tensor:
        """All but the newest entry where the first new token accumulates into it."""
        assert update.decisions is not None
        starts_B = torch.tensor(step.starts, device=step.device)
        return caches.before_BG - update.decisions.hard[starts_B].to(torch.int32)

    def whole(
        self,
        q_TBND: Tensor,
        k_SBGD: Tensor,
        v_SBGD: Tensor,
        geometry: Geometry,
        *,
        adapter_SBG: Tensor | None = None,
        noise: NoiseSource | None = None,
        ranks: Ranks = ALONE,
    ) -> Whole:
        """See :meth:`Method.whole`. Decisions are those of the whole sequence, [S, B, G]."""
        logits = read_logits(q_TBND, k_SBGD, self.settings, ranks)
        k_SBGD, v_SBGD, *logits_SBG = (ranks.whole_sequence(x) for x in (k_SBGD, v_SBGD, *logits))
        noise_SBG = None if noise is None else noise(logits_SBG[0].shape[-1])
        decided = decide(logits_SBG[0], logits_SBG[1], geometry.first_SB, self.settings, noise_SBG)
        every_head = decided.of_heads(k_SBGD.shape[2])
        assert every_head.omega is not None
        weights = Weights(every_head.alpha, every_head.omega, every_head.key_bias)
        output = compressed_attention(q_TBND, k_SBGD, v_SBGD, weights, geometry, window_size=self.settings.window_size)
        return Whole(output, decided)


def _check_shapes(decision: Tensor, importance: Tensor, noise: Tensor | None, first: Tensor) -> None:
    expected = tuple(decision.shape)
    for name, given in (("importance logits", importance), ("noise", noise)):
        if given is not None and given.shape != decision.shape:
            raise ValueError(f"{name} {tuple(given.shape)}: must be that of the decision logits {expected}")
    if first.shape != decision.shape[:-1]:
        raise ValueError(f"decision logits {expected}: the geometry was made for positions {tuple(first.shape)}")

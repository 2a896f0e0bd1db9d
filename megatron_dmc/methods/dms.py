"""Dynamic Memory Sparsification: each KV head decides for every token whether it is evicted once a window has passed.

Source: [DMS] arXiv 2506.05345 and NVIDIA's code of it. Query i sees key j of its document if i - j <= W, or if j is not
marked. Two forms of one function: with noise the relaxation that is trained (keys behind the window carry a bias),
without it hard decisions, which equal decoding token by token with the sparsified cache. One decision rule,
:func:`decide`, serves training, evaluation, prompts and decoding.

Which token decides about token j is a setting: itself (the paper), or the one after it (the code of its authors); then
nothing has decided about the newest token yet, which is kept. The first token of a document can be evicted like any
other. Where the decision comes from is another: the borrowed last channel of the first query head of each KV head
(which leaves keys and the other query heads whole), or an adapter, and then nothing is borrowed.

What it is not: a merge as in DMC (what is evicted is gone), or a budget as in H2O and TOVA: how much is kept depends on
the text. The authors' decoder evicts one position earlier than their training does; here both wait for W.

Shapes: S positions, T new tokens (or queries), B sequences, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.config import ADAPTER, NEXT, DMCConfig
from megatron_dmc.methods.base import ALONE, HeadCaches, Keep, Method, Ranks, Slot, State, Update, Whole
from megatron_dmc.methods.decisions import Decisions, NoiseSource
from megatron_dmc.methods.step import Tokens
from megatron_dmc.models.borrowed_channel import borrowed_by
from megatron_dmc.ops import decisions, eviction_window
from megatron_dmc.ops.eviction_window import ALL
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import HIDDEN, attend_masked, masked_attention
from megatron_dmc.ops.rotated import rotated_keys, rotated_queries

WINDOW = "window"
"""Name of the ring of tokens that leave the window next in the cache."""


def read_logits(q_SBND: Tensor, num_kv_heads: int, adapter_SBG: Tensor | None, settings: DMCConfig) -> Tensor:
    """Decision logits, float32 [..., G], from queries [..., N, D] before RoPE or the output of the adapter [..., G]."""
    if settings.decision_source == ADAPTER:
        assert adapter_SBG is not None, "the adapter decides: its output must be given"
        return decisions.adapter_logits(adapter_SBG, settings.decision_bias)
    return decisions.first_query_logits(q_SBND, num_kv_heads, settings.decision_bias)


def decide(logits: Tensor, first: Tensor, settings: DMCConfig, noise: Tensor | None = None) -> Decisions:
    """The decisions of :func:`read_logits`' logits [S, B, G], or [T, G] of packed tokens, by the token that takes them.

    Args:
        logits: float32.
        first: bool without the last dimension, True where a sequence or document begins.
        settings: of the method.
        noise: logistic, of the shape of the logits: the relaxation; None: hard decisions.

    Raises:
        ValueError: shapes that differ.
    """
    if first.shape != logits.shape[:-1]:
        raise ValueError(f"decision logits {tuple(logits.shape)}: the geometry was made for {tuple(first.shape)}")
    if noise is not None and noise.shape != logits.shape:
        raise ValueError(f"noise {tuple(noise.shape)}: must be that of the decision logits {tuple(logits.shape)}")
    if noise is None:
        relaxed = None
        taken = decisions.hard_decisions(logits, settings.decision_threshold)
        alpha = taken.to(logits.dtype)
        own_bias = HIDDEN * alpha
    else:
        noisy = decisions.relaxed_logits(logits, noise, settings.temperature)
        taken = decisions.hard_decisions(noisy.detach(), 0.0)
        alpha = relaxed = torch.sigmoid(noisy)
        own_bias = F.logsigmoid(-noisy)
    # The first token has nobody before it to decide about.
    hard = taken & ~first.unsqueeze(-1) if settings.decided_by == NEXT else taken
    return Decisions(logits, taken, hard, alpha, own_bias, relaxed=relaxed, noise=noise)


class DMS(Method):
    """The sparsified cache of a model that was retrofitted.

    Args:
        settings: of the model.
    """

    name = "dms"
    has_whole_form = True
    exact_recompute = True

    def __init__(self, settings: DMCConfig) -> None:
        self.settings = settings
        self.borrowed = borrowed_by(settings)
        self.neuron_scale = 1.0 if settings.decision_source == ADAPTER else 0.0
        self.decision_delay = settings.window_size + (0 if settings.decided_by == NEXT else 1)

    def state(self, head_dim: int) -> Mapping[str, Slot]:
        """What leaves the window next, for every head: see ``ops.eviction_window``."""
        return {WINDOW: Slot((self.settings.window_size + 1,), torch.int32)}

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """Take the place of the token that leaves the window, if it is marked, or append.

        Of several tokens those are never written that are evicted by the end of the pass: they attend to one another as
        they come. Earlier entries stay until the pass has seen them, and then go (:meth:`survivors`).
        """
        step = tokens.step
        logits_TG = read_logits(tokens.q_TND, tokens.k_TGD.shape[1], tokens.adapter_TG, self.settings)
        decided = decide(logits_TG, step.first_T, self.settings)
        k_TGD = self.rotated_keys(tokens.k_TGD, step)
        if step.decodes:
            entry_BG, ring = self._absorb_one(decided.hard, state[WINDOW], length_BG, step.position_T)
            return Update(k_TGD, tokens.v_TGD, entry_BG, {WINDOW: ring}, decided)
        part = step.part
        ring, marked_TG = state[WINDOW], decided.hard
        if self.settings.decided_by == NEXT:
            ring = eviction_window.mark_newest(ring, decided.hard[part.last_B - part.count_B + 1], part.position_B)
            marked_TG = decided.hard.roll(-1, 0).index_fill(0, part.last_B, False)
        seen_BGE = eviction_window.num_queries(ring, part, int(length_BG.max())) if step.continues else None
        entry_TG, ring = eviction_window.take_places(ring, marked_TG, length_BG, part)
        return Update(k_TGD, tokens.v_TGD, entry_TG, {WINDOW: ring}, decided, seen_BGE)

    def _absorb_one(
        self, hard_BG: Tensor, ring_BGR: Tensor, length_BG: Tensor, position_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Place of one new token of each sequence, and the ring with it."""
        if self.settings.decided_by == NEXT:
            ring_BGR = eviction_window.mark_newest(ring_BGR, hard_BG, position_B)
            hard_BG = torch.zeros_like(hard_BG)
        return eviction_window.take_place(ring_BGR, hard_BG, length_BG, position_B)

    def attend_own(self, tokens: Tokens, update: Update) -> tuple[Tensor, Tensor]:
        """As in whole sequences: marked tokens are hidden from those behind their window."""
        assert update.decisions is not None
        q, k, v = (x.unsqueeze(1) for x in (self.rotated_queries(tokens), update.k_TGD, update.v_TGD))
        bias_T1G = self._key_bias(update.decisions).unsqueeze(1)
        geometry = tokens.step.geometry
        out_T1ND, lse_1NT = attend_masked(q, k, v, bias_T1G, geometry, free_window=self.settings.window_size)
        return out_T1ND.squeeze(1).transpose(0, 1), lse_1NT[0]

    def survivors(self, tokens: Tokens, update: Update, caches: HeadCaches) -> Keep | None:
        """All that the last of the new tokens sees."""
        if update.num_queries_BGE is None:
            return None
        num_entries = int(caches.length_BG.max())
        seen_BGE = F.pad(update.num_queries_BGE, (0, num_entries - update.num_queries_BGE.shape[-1]), value=ALL)
        filled_BGE = torch.arange(num_entries, device=seen_BGE.device) < caches.length_BG.unsqueeze(-1)
        stays_BGE = filled_BGE & (seen_BGE >= tokens.step.part.count_B.view(-1, 1, 1))
        if torch.equal(stays_BGE, filled_BGE):
            return None
        entry_BGE = stays_BGE.int().argsort(dim=-1, descending=True, stable=True)
        ring = eviction_window.move_places(update.state[WINDOW], stays_BGE.cumsum(-1) - 1)
        return Keep(entry_BGE, stays_BGE.sum(-1).int(), {WINDOW: ring})

    def expected_entries(self, num_tokens: int) -> float:
        """The window, and of the tokens behind it as many as the ratio leaves that the model was trained for."""
        held = min(num_tokens, self.settings.window_size + 1)
        return held + (num_tokens - held) / self.settings.target_cr

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
        num_kv_heads = k_SBGD.shape[2]
        local = (k_SBGD, v_SBGD, read_logits(q_TBND, num_kv_heads, adapter_SBG, self.settings))
        k_SBGD, v_SBGD, logits_SBG = (ranks.whole_sequence(x) for x in local)
        noise_SBG = None if noise is None else noise(num_kv_heads)
        decided = decide(logits_SBG, geometry.first_SB, self.settings, noise_SBG)
        output = masked_attention(
            rotated_queries(q_TBND, num_kv_heads, geometry, self.neuron_scale, self.borrowed),
            rotated_keys(k_SBGD, geometry, self.neuron_scale, self.borrowed),
            v_SBGD,
            self._key_bias(decided),
            geometry,
            free_window=self.settings.window_size,
        )
        return Whole(output, decided)

    def _key_bias(self, decided: Decisions) -> Tensor:
        """Score bias of each key for the queries behind its window."""
        return decided.key_bias if self.settings.decided_by == NEXT else decided.own_bias

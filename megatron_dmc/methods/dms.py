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

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.config import ADAPTER, NEXT, DMCConfig
from megatron_dmc.methods.base import ALONE, Method, Ranks, State, Update, Whole
from megatron_dmc.methods.decisions import Decisions, NoiseSource
from megatron_dmc.methods.step import Tokens
from megatron_dmc.models.borrowed_channel import borrowed_by
from megatron_dmc.ops import decisions
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import HIDDEN, masked_attention
from megatron_dmc.ops.rotated import rotated_keys, rotated_queries


def read_logits(q_SBND: Tensor, num_kv_heads: int, adapter_SBG: Tensor | None, settings: DMCConfig) -> Tensor:
    """Decision logits, float32 [..., G], from queries [..., N, D] before RoPE or the output of the adapter [..., G]."""
    if settings.decision_source == ADAPTER:
        assert adapter_SBG is not None, "the adapter decides: its output must be given"
        return decisions.adapter_logits(adapter_SBG, settings.decision_bias)
    return decisions.first_query_logits(q_SBND, num_kv_heads, settings.decision_bias)


def decide(logits: Tensor, first: Tensor, settings: DMCConfig, noise: Tensor | None = None) -> Decisions:
    """The decisions of :func:`read_logits`' logits [S, B, G], or [T, G] of packed tokens, each at the token that takes it.

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

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        raise NotImplementedError

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

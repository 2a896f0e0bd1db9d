"""Three ways through attention, from raw projections to output: whole sequences, prompts into the cache, one step.

All three take their decisions as training does. A plain Llama goes the same ways and appends every token.

Legend: S sequence (1 when decoding), B batch, N query heads, G KV heads, D head dim, T entries of a head cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cache.paged_kv_cache import PagedKVCache
from megatron_dmc.methods import dmc
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.ops.cache_update import open_segment_state, segment_ends, update_segments
from megatron_dmc.ops.decisions import hard_decisions, importance
from megatron_dmc.ops.kv_pooling import pool_forward
from megatron_dmc.ops.paged_attention import paged_attention
from megatron_dmc.ops.rope import Rotation, cos_sin, faded_rotation, inverse_frequencies, rotate


class Attention(Protocol):
    """What a layer calls between its projections."""

    def __call__(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        """[S, B, N, D] from queries and keys before RoPE; layers count from 0."""


@dataclass
class DecisionTrace:
    """The decisions of one forward pass, by layer: float32 logits and bool alpha, [S, B, G] each."""

    logits: list[Tensor] = field(default_factory=list)
    alpha: list[Tensor] = field(default_factory=list)


class AttentionSettings:
    """What attention needs to know of a model.

    Args:
        config: its shape.
        settings: of DMC; None for a plain Llama.
        device: of the tensors to come.
    """

    def __init__(self, config: ModelConfig, settings: DMCConfig | None, device: torch.device) -> None:
        self.settings = settings
        self.compresses = settings is not None and settings.compresses
        # At the end of zero_out the borrowed channels have faded to zero; a plain Llama lends none.
        self.neuron_scale = 1.0 if settings is None or settings.stage == "off" else 0.0
        self.inverse_frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(
            device
        )

    def cos_sin(self, position_S: Tensor) -> tuple[Tensor, Tensor]:
        """Of the angles at ``position_S``: float32 [S, D/2]."""
        return cos_sin(position_S, self.inverse_frequencies)

    def rotation(self, position_S: Tensor) -> Rotation:
        """As training turns keys and queries: the borrowed channel fades before and after."""
        return faded_rotation(*self.cos_sin(position_S), self.neuron_scale)


class Decisions(NamedTuple):
    """What a model decides about each token, [S, B, G] each: float32 logits, bool alpha, float32 omega."""

    logits: Tensor
    alpha: Tensor
    omega: Tensor


def decide(q_SBND: Tensor, k_SBGD: Tensor, settings: DMCConfig, first_SB: Tensor) -> Decisions:
    """Hard decisions; where ``first_SB`` is true a sequence begins, whose token always appends."""
    # With one decision per layer the logits have one head, and every KV head follows it.
    decision_SBG, importance_SBG = (x.expand(k_SBGD.shape[:-1]) for x in dmc.read_logits(q_SBND, k_SBGD, settings))
    alpha_SBG = hard_decisions(decision_SBG, settings.decision_threshold) & ~first_SB.unsqueeze(-1)
    return Decisions(decision_SBG, alpha_SBG, importance(importance_SBG, settings.importance_epsilon))


class FullSequenceAttention:
    """Whole sequences at once, with hard decisions; nothing is cached.

    Args:
        model: settings of the model.
        sequence_length: S.
        trace: filled with the decisions of each layer.
    """

    def __init__(self, model: AttentionSettings, sequence_length: int, trace: DecisionTrace | None = None) -> None:
        self.model = model
        self.trace = trace
        self.cos_sin_S = model.cos_sin(torch.arange(sequence_length, device=model.inverse_frequencies.device))

    def __call__(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        settings = self.model.settings
        if settings is None or not settings.compresses:
            return dmc.faded_attention(q_SBND, k_SBGD, v_SBGD, self.model.neuron_scale, cos_sin_S=self.cos_sin_S)
        decision_SBG, importance_SBG = dmc.read_logits(q_SBND, k_SBGD, settings)
        output_SBND, alpha_SBG = dmc.compressed_attention(
            q_SBND,
            k_SBGD,
            v_SBGD,
            decision_SBG,
            importance_SBG,
            settings,
            cos_sin_S=self.cos_sin_S,
            noise_SBG=None,
        )
        if self.trace is not None:
            self.trace.logits.append(decision_SBG.expand_as(alpha_SBG))
            self.trace.alpha.append(alpha_SBG)
        return output_SBND


class PrefillAttention:
    """Whole prompts at once, whose entries and open segments then stand in the cache.

    Args:
        whole: attention over the prompts, padded at their ends to one length.
        cache: with empty rows ``rows_B``.
        length_B: tokens of each prompt.
    """

    def __init__(self, whole: FullSequenceAttention, cache: PagedKVCache, rows_B: Tensor, length_B: Tensor) -> None:
        self.whole = whole
        self.cache = cache
        self.rows_B = rows_B
        self.length_B = length_B

    def __call__(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        if self.whole.model.compresses:
            self._store_segments(layer, q_SBND, k_SBGD, v_SBGD)
        else:
            self._store_tokens(layer, k_SBGD, v_SBGD)
        return self.whole(layer, q_SBND, k_SBGD, v_SBGD)

    @torch.no_grad()
    def _store_segments(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> None:
        settings, segments = self.whole.model.settings, self.cache.segments
        assert settings is not None
        assert segments is not None
        first_SB = torch.zeros(k_SBGD.shape[:2], dtype=torch.bool, device=k_SBGD.device)
        first_SB[0] = True
        _, alpha_SBG, omega_SBG = decide(q_SBND, k_SBGD, settings, first_SB)
        means = pool_forward((k_SBGD, v_SBGD), alpha_SBG.to(omega_SBG.dtype), omega_SBG, settings.window_size)
        position_BGT, lengths_BG = segment_ends(alpha_SBG, self.length_B)
        k_BGTD, v_BGTD = (_at_positions(mean_SBGD, position_BGT) for mean_SBGD in means)
        rotation = self.whole.model.rotation(position_BGT.flatten())
        k_BGTD = rotate(k_BGTD.view(-1, 1, 1, k_BGTD.shape[-1]), rotation, k_SBGD.dtype).view(k_BGTD.shape)
        self.cache.write_prompt(layer, self.rows_B, k_BGTD, v_BGTD.to(v_SBGD.dtype), lengths_BG)
        state = open_segment_state(k_SBGD, v_SBGD, alpha_SBG, omega_SBG, self.length_B, settings.window_size)
        segments[layer, self.rows_B] = state

    @torch.no_grad()
    def _store_tokens(self, layer: int, k_SBGD: Tensor, v_SBGD: Tensor) -> None:
        rotation = faded_rotation(*self.whole.cos_sin_S, self.whole.model.neuron_scale)
        k_SBGD = rotate(k_SBGD, rotation, k_SBGD.dtype)
        lengths_BG = self.length_B.to(torch.int32).unsqueeze(-1).expand(k_SBGD.shape[1:3])
        self.cache.write_prompt(layer, self.rows_B, k_SBGD.permute(1, 2, 0, 3), v_SBGD.permute(1, 2, 0, 3), lengths_BG)


class DecodeAttention:
    """The next token of each sequence: one update of every head cache, then attention over it. No gradients.

    Args:
        model: settings of the model.
        cache: read and updated.
        rows_B: the sequences.
        trace: filled with the decisions of each layer.
    """

    def __init__(
        self, model: AttentionSettings, cache: PagedKVCache, rows_B: Tensor, trace: DecisionTrace | None = None
    ) -> None:
        self.model = model
        self.cache = cache
        self.rows_B = rows_B
        self.trace = trace
        self.position_B = cache.num_tokens[rows_B]
        self.first_SB = (self.position_B == 0).unsqueeze(0)
        self.rotation = model.rotation(self.position_B)

    @torch.no_grad()
    def __call__(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> Tensor:
        cache, rows_B = self.cache, self.rows_B
        if self.model.compresses:
            append_BG, k_BGD, v_BGD = self._update(layer, q_SBND, k_SBGD, v_SBGD)
        else:
            k_BGD, v_BGD = k_SBGD[0], v_SBGD[0]
            append_BG = torch.ones(k_BGD.shape[:2], dtype=torch.bool, device=k_BGD.device)
        dtype = q_SBND.dtype
        cache.write_newest(layer, rows_B, append_BG, self._rotated(k_BGD, dtype), v_BGD.to(dtype))
        output_BND = paged_attention(
            self._rotated(q_SBND[0], dtype),
            cache.k_blocks,
            cache.v_blocks,
            cache.block_table[layer, rows_B],
            cache.cache_seqlens[layer, rows_B],
        )
        return output_BND.unsqueeze(0)

    def _update(self, layer: int, q_SBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which heads append, and the newest entry of every head before RoPE, float32."""
        settings, segments = self.model.settings, self.cache.segments
        assert settings is not None
        assert segments is not None
        decisions = decide(q_SBND, k_SBGD, settings, self.first_SB)
        if self.trace is not None:
            self.trace.logits.append(decisions.logits)
            self.trace.alpha.append(decisions.alpha)
        segments[layer, self.rows_B], k_BGD, v_BGD = update_segments(
            segments[layer, self.rows_B],
            k_SBGD[0],
            v_SBGD[0],
            decisions.alpha[0],
            decisions.omega[0],
            self.position_B,
        )
        return ~decisions.alpha[0], k_BGD, v_BGD

    def _rotated(self, x_BHD: Tensor, dtype: torch.dtype) -> Tensor:
        return rotate(x_BHD.unsqueeze(1), self.rotation, dtype).squeeze(1)


def _at_positions(x_SBGD: Tensor, position_BGT: Tensor) -> Tensor:
    """[B, G, T, D]: rows of ``x_SBGD`` at the positions of each head."""
    index_BGTD = position_BGT.unsqueeze(-1).expand(*position_BGT.shape, x_SBGD.shape[-1])
    return x_SBGD.permute(1, 2, 0, 3).gather(2, index_BGTD)

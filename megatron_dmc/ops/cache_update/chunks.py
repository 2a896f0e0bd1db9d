"""Many new tokens of each sequence at once, as :func:`segments.update_segments` would take them one by one.

The tokens are packed, those of one sequence after those of another. A sequence whose cache has an open segment gets
its sums in front as tokens of their own: one with their mean and weight, or with a window the tokens of the ring.
Pooling then starts from nothing, as it does in training.

Legend: T new tokens of all sequences, B sequences, G KV heads, D head dim, W window_size, K = 2 D + 1 weighted sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.cache_update.segments import weighted_sums
from megatron_dmc.ops.kv_pooling import pool_forward

_NO_WEIGHT = 1e-30
"""Stands for a weight of 0, which nothing could be divided by; below every rounding."""


def entry_places(accumulate_TG: Tensor, counts: Sequence[int], length_BG: Tensor) -> Tensor:
    """int32 [T, G]: the entry of each token that ends a segment so far; -1 for tokens that a later one overwrites.

    Args:
        accumulate_TG: hard decisions, bool.
        counts: tokens of each sequence.
        length_BG: int32 entries of each head cache before them.
    """
    place = _Places(counts, accumulate_TG.device)
    append_TG = ~accumulate_TG
    appended_TG = append_TG.cumsum(0)
    before_BG = torch.where(place.start_B1 > 0, appended_TG[(place.start_B1[:, 0] - 1).clamp(min=0)], 0)
    entry_TG = (length_BG - before_BG)[place.sequence_T] + appended_TG - 1
    ends_TG = append_TG.roll(-1, dims=0)
    ends_TG[place.last_B] = True
    return torch.where(ends_TG, entry_TG, -1).to(torch.int32)


def pool_chunks(
    state: Tensor | None,
    k_TGD: Tensor,
    v_TGD: Tensor,
    accumulate_TG: Tensor,
    omega_TG: Tensor,
    counts: Sequence[int],
    positions: Sequence[int],
    window_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the segments at every token, and the state after the last one of each sequence.

    Args:
        state: of the open segments, see :func:`segments.update_segments`; None where every sequence begins.
        k_TGD, v_TGD: keys before RoPE and values.
        accumulate_TG: hard decisions, bool; False at position 0.
        omega_TG: float32 importances.
        counts: tokens of each sequence.
        positions: position of the first of them.
        window_size: tokens in the mean of a segment; 0 = the whole segment.

    Returns:
        Keys and values, float32 [T, G, D], and the new state, float32 [B, G, K] or [B, G, W, K].
    """
    tokens = _Tokens(k_TGD, v_TGD, accumulate_TG, omega_TG)
    if state is None:
        k_mean, v_mean = _pooled(tokens, window_size)
        return k_mean, v_mean, _state_after(tokens, (k_mean, v_mean), counts, positions, window_size)
    carried = _carried(state, positions)
    in_front = carried.omega.shape[1]
    together = _joined(carried, tokens, counts)
    counts = [count + in_front for count in counts]
    means = _pooled(together, window_size)
    state = _state_after(together, means, counts, [position - in_front for position in positions], window_size)
    new_T = torch.cat([torch.arange(count) >= in_front for count in counts]).to(k_TGD.device)
    return means[0][new_T], means[1][new_T], state


class _Tokens(NamedTuple):
    k: Tensor
    v: Tensor
    accumulate: Tensor
    omega: Tensor


class _Places:
    """Where each sequence lies among packed tokens."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        counts_B = torch.tensor(counts, device=device)
        self.last_B = counts_B.cumsum(0) - 1
        self.start_B1 = (self.last_B - counts_B + 1).unsqueeze(-1)
        self.sequence_T = torch.arange(len(counts), device=device).repeat_interleave(counts_B, output_size=sum(counts))


def _pooled(tokens: _Tokens, window_size: int) -> tuple[Tensor, Tensor]:
    alpha_T1G = tokens.accumulate.to(tokens.omega.dtype).unsqueeze(1)
    xs = (tokens.k.unsqueeze(1), tokens.v.unsqueeze(1))
    k_mean, v_mean = pool_forward(xs, alpha_T1G, tokens.omega.unsqueeze(1), window_size)
    return k_mean.squeeze(1), v_mean.squeeze(1)


def _carried(state: Tensor, positions: Sequence[int]) -> _Tokens:
    """The tokens that stand for open segments, [B, F, G, ...] in the order of their positions."""
    if state.dim() == 3:
        sums = state.unsqueeze(1)
    else:
        ring = state.shape[2]
        first_B1 = torch.tensor(positions, device=state.device).unsqueeze(-1)
        slot_BW = (first_B1 + torch.arange(ring, device=state.device)) % ring
        sums = state.gather(2, slot_BW[:, None, :, None].expand_as(state)).transpose(1, 2)
    omega = sums[..., -1].clamp(min=_NO_WEIGHT)
    k, v = (sums[..., :-1] / omega.unsqueeze(-1)).chunk(2, dim=-1)
    accumulate = torch.ones_like(omega, dtype=torch.bool)
    accumulate[:, 0] = False
    return _Tokens(k, v, accumulate, omega)


def _joined(carried: _Tokens, tokens: _Tokens, counts: Sequence[int]) -> _Tokens:
    """Packed tokens with those of the open segments in front of each sequence."""
    parts = []
    for old, new in zip(carried, tokens, strict=True):
        pieces = zip(old, new.to(old.dtype).split(list(counts)), strict=True)
        parts.append(torch.cat([part for pair in pieces for part in pair]))
    return _Tokens(*parts)


def _state_after(
    tokens: _Tokens, means: tuple[Tensor, Tensor], counts: Sequence[int], positions: Sequence[int], window_size: int
) -> Tensor:
    """State of the segments that are open after the last token of each sequence."""
    place = _Places(counts, tokens.omega.device)
    here_T1 = torch.arange(len(tokens.omega), device=tokens.omega.device).unsqueeze(-1)
    appended_TG = torch.where(tokens.accumulate, -1, here_T1)
    start_BG = place.start_B1.expand(-1, appended_TG.shape[1]).clone()
    sequence_TG = place.sequence_T.unsqueeze(-1).expand_as(appended_TG)
    start_BG.scatter_reduce_(0, sequence_TG, appended_TG, "amax")
    if window_size == 0:
        weight_TG = torch.where(here_T1 >= start_BG[place.sequence_T], tokens.omega, 0.0)
        z_BG1 = (
            torch.zeros_like(means[0][place.last_B][..., 0]).index_add_(0, place.sequence_T, weight_TG).unsqueeze(-1)
        )
        return torch.cat([*(z_BG1 * mean[place.last_B] for mean in means), z_BG1], dim=-1)
    # The W positions up to the last one hit every slot of the ring once.
    back_W = torch.arange(window_size, device=tokens.omega.device)
    place_BW = place.last_B.unsqueeze(-1) - back_W
    inside_BWG = place_BW.unsqueeze(-1) >= start_BG.unsqueeze(1)
    gathered = (x[place_BW.clamp(min=0)] for x in (tokens.k, tokens.v, tokens.omega))
    weighted_BGWK = torch.where(inside_BWG.unsqueeze(-1), weighted_sums(*gathered), 0.0).transpose(1, 2)
    last_position_B1 = torch.tensor(positions, device=back_W.device).unsqueeze(-1) + torch.tensor(
        counts, device=back_W.device
    ).unsqueeze(-1)
    slot_BW = (last_position_B1 - 1 - back_W) % window_size
    return torch.empty_like(weighted_BGWK).scatter_(
        2, slot_BW[:, None, :, None].expand_as(weighted_BGWK), weighted_BGWK
    )

"""One token of each sequence into the head caches of a layer, in place: the form in torch operations.

Legend: see ``head_caches``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops import decisions
from megatron_dmc.ops.cache_update.head_caches import FreeBlocks, HeadCaches, Logits, Merging, NewTokens
from megatron_dmc.ops.cache_update.segments import update_segments
from megatron_dmc.ops.paged_attention import write_entries
from megatron_dmc.ops.rope import faded_rotation, rotate


def update_caches(
    tokens: NewTokens,
    caches: HeadCaches,
    rows_B: Tensor,
    *,
    merging: Merging | None = None,
    logits: Logits | None = None,
    neuron_scale: float = 1.0,
    free: FreeBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`megatron_dmc.ops.cache_update.update_caches`; no row may be -1."""
    length_BG = caches.cache_seqlens_AG[rows_B]
    k_BGD, v_BGD = tokens.k_BGD, tokens.v_BGD
    accumulate_BG = torch.zeros_like(length_BG, dtype=torch.bool)
    state = None
    if merging is not None:
        assert caches.state is not None
        decision, importance = logits or _read_logits(tokens, merging)
        taken = decisions.hard_decisions(decision, merging.decision_threshold)
        accumulate_BG = (taken & (tokens.position_B > 0).unsqueeze(-1)).expand_as(length_BG)
        omega_BG = decisions.importance(importance, merging.importance_epsilon).expand_as(length_BG)
        state, k_BGD, v_BGD = update_segments(
            caches.state[rows_B], k_BGD, v_BGD, accumulate_BG, omega_BG, tokens.position_B
        )
    entry_BG = length_BG - accumulate_BG.to(torch.int32)
    found_BG = torch.ones_like(accumulate_BG)
    if free is not None:
        found_BG = _take_blocks(caches, rows_B, entry_BG, (entry_BG == length_BG), free)
    # Only where there is a block: rows and heads of the entries that are stored.
    sequence, head = found_BG.nonzero(as_tuple=True)
    place = (rows_B[sequence], head)
    if state is not None and caches.state is not None:
        caches.state[place] = state[found_BG]
    k_entry = _rotated(k_BGD, tokens, neuron_scale, tokens.k_BGD.dtype)[found_BG]
    _store(caches, place, entry_BG[found_BG], k_entry, v_BGD.to(tokens.v_BGD.dtype)[found_BG])
    caches.cache_seqlens_AG[place] = entry_BG[found_BG] + 1
    return _rotated(tokens.q_BND, tokens, neuron_scale, tokens.q_BND.dtype), accumulate_BG


def _read_logits(tokens: NewTokens, merging: Merging) -> Logits:
    importance = decisions.importance_logits(tokens.q_BND, tokens.k_BGD.shape[1], merging.decision_bias)
    return Logits(decisions.decision_logits(tokens.k_BGD, merging.decision_bias), importance)


def _rotated(x_BHD: Tensor, tokens: NewTokens, neuron_scale: float, dtype: torch.dtype) -> Tensor:
    rotation = faded_rotation(tokens.cos_BC, tokens.sin_BC, neuron_scale)
    return rotate(x_BHD.unsqueeze(1), rotation, dtype).squeeze(1)


def _take_blocks(caches: HeadCaches, rows_B: Tensor, entry_BG: Tensor, append_BG: Tensor, free: FreeBlocks) -> Tensor:
    """Give a block to every head whose new entry begins one; bool [B, G]: False where none was left."""
    block_size = caches.kv.block_size
    begins_BG = append_BG & (entry_BG % block_size == 0)
    place_BG = free.num_free - begins_BG.flatten().cumsum(0).view(begins_BG.shape)
    found_BG = ~begins_BG | (place_BG >= 0)
    sequence, head = (begins_BG & found_BG).nonzero(as_tuple=True)
    column = entry_BG[sequence, head] // block_size
    caches.block_table_AGM[rows_B[sequence], head, column] = free.block_F[place_BG[sequence, head]]
    free.num_free.sub_(begins_BG.sum())
    return found_BG


def _store(caches: HeadCaches, place: tuple[Tensor, Tensor], entry_E: Tensor, k_ED: Tensor, v_ED: Tensor) -> None:
    """Write one entry of each of E different head caches."""
    kv = caches.kv
    if kv.k_open is None or kv.v_open is None or kv.open_entry_BG is None:
        _write_blocks(caches, place, entry_E, k_ED, v_ED)
        return
    before_E = kv.open_entry_BG[place]
    closes_E = (before_E >= 0) & (before_E != entry_E)
    closed = (place[0][closes_E], place[1][closes_E])
    _write_blocks(caches, closed, before_E[closes_E], kv.k_open[closed], kv.v_open[closed])
    kv.k_open[place], kv.v_open[place], kv.open_entry_BG[place] = k_ED, v_ED, entry_E


def _write_blocks(
    caches: HeadCaches, place: tuple[Tensor, Tensor], entry_E: Tensor, k_ED: Tensor, v_ED: Tensor
) -> None:
    block_size = caches.kv.block_size
    block_E = caches.block_table_AGM[(*place, (entry_E // block_size).long())].long()
    write_entries(caches.kv, block_E * block_size + entry_E % block_size, k_ED, v_ED)

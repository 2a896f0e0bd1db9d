"""Attention over a paged cache on a CPU: the blocks are the batch of two matrix products, each read where it lies.

No head cache is brought into one piece, and none is padded to the longest: a block costs the same whoever holds it, and
all cores share them evenly. Every block has a softmax of its own; those of a head cache are added by their
log-sum-exp. Where the blocks of a layer fill most of a part of the pool, that part is read as it is, and what others
hold in it is dropped; else they are copied together first.

Legend: L layers, B sequences, N query heads, G KV heads, R = N / G, H = B G head caches, D head dim, P entries per
block, M blocks per head cache, X blocks that are read, F blocks that are held in all layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype

MAX_SPAN = 2
"""A part of the pool is read as it is up to so many times the blocks that are held in it: copying those costs more."""
NO_SCORE = -1e30
"""Below every score, and unlike -inf harmless where a whole block has no other."""


class InPlace(NamedTuple):
    """The blocks of all head caches of some sequences in one layer, in any order."""

    where: slice | Tensor
    """The part of the pool in which they lie, or their numbers, int64 [X]."""
    head_X: Tensor
    """int64 head cache b G + g of each block; H where none of these sequences holds it."""
    reader_X: Tensor
    """The same, but any head cache where none holds it."""
    open_H: Tensor
    """int64 which of them is the last of each head cache, the only one with places that may be empty."""
    place_HP: Tensor
    """int32 places of its entries in the head cache."""

    def attend(self, q_BND: Tensor, k_blocks: Tensor, v_blocks: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
        """See :meth:`megatron_dmc.ops.paged_attention.on_cpu.DecodePlan.attend`."""
        num_heads, dtype = len(self.open_H), accumulation_dtype(q_BND.dtype)
        k_XPD, v_XPD = self._read(k_blocks).to(dtype), self._read(v_blocks).to(dtype)
        q_HRD = (q_BND.to(dtype) * q_BND.shape[-1] ** -0.5).view(num_heads, -1, q_BND.shape[-1])
        score_XRP = torch.bmm(q_HRD.index_select(0, self.reader_X), k_XPD.mT)
        is_empty_HP = self.place_HP >= cache_seqlens_BG.view(-1, 1)
        open_HRP = score_XRP.index_select(0, self.open_H).masked_fill_(is_empty_HP.unsqueeze(1), NO_SCORE)
        score_XRP.index_copy_(0, self.open_H, open_HRP)
        weight_XRP = score_XRP.softmax(-1)
        lse_XR = score_XRP.amax(-1) - weight_XRP.amax(-1).log_()
        share_XR, sum_HR = self._shares(lse_XR)
        weight_XRP *= share_XR.unsqueeze(-1)
        out_HRD = q_HRD.new_zeros(num_heads + 1, *q_HRD.shape[1:])
        out_HRD.index_add_(0, self.head_X, torch.bmm(weight_XRP, v_XPD))
        out_HRD /= sum_HR.unsqueeze(-1)
        return out_HRD[:-1].reshape(q_BND.shape).to(q_BND.dtype)

    def _read(self, pool: Tensor) -> Tensor:
        return pool[self.where] if isinstance(self.where, slice) else pool.index_select(0, self.where)

    def _shares(self, lse_XR: Tensor) -> tuple[Tensor, Tensor]:
        """What the softmax of each block counts for in that of its head cache, and the sum of that."""
        top_HR = lse_XR.new_full((len(self.open_H) + 1, lse_XR.shape[1]), -torch.inf)
        top_HR.scatter_reduce_(0, self.head_X.unsqueeze(-1).expand_as(lse_XR), lse_XR, "amax")
        share_XR = (lse_XR - top_HR.index_select(0, self.head_X)).exp_()
        return share_XR, torch.zeros_like(top_HR).index_add_(0, self.head_X, share_XR)


def plan_in_place(block_table_LBGM: Tensor, held_LBG: Tensor, block_size: int) -> list[InPlace]:
    """What each layer reads, made for all of them at once.

    Args:
        block_table_LBGM: int32 blocks of each head cache in order.
        held_LBG: int32 how many of them there are, at least 1; all but the last are full.
        block_size: entries per block.
    """
    held = _Held(block_table_LBGM.flatten(1, 2), held_LBG.flatten(1))
    is_whole_L = held.span_L <= MAX_SPAN * held.count_L
    layout = held.laid_out(is_whole_L)
    is_shared_F = layout.head_X[layout.place_F] != held.head_F
    if is_shared_F.any():
        # Head caches that hold the same block read it once each.
        is_whole_L[held.layer_F[is_shared_F]] = False
        layout = held.laid_out(is_whole_L)
    sizes, num_heads = layout.size_L.tolist(), held_LBG[0].numel()
    parts = zip(
        is_whole_L.tolist(), held.first_L.tolist(), sizes, held.block_F.split(held.count_L.tolist()), strict=True
    )
    where = [slice(first, first + size) if is_whole else block_X for is_whole, first, size, block_X in parts]
    head_X = layout.head_X.split(sizes)
    reader_X = layout.head_X.clamp(max=num_heads - 1).split(sizes)
    start_L = layout.size_L.cumsum(0) - layout.size_L
    last_LH = held_LBG.flatten().cumsum(0).view(-1, num_heads) - 1
    open_LH = layout.place_F[last_LH] - start_L.unsqueeze(-1)
    steps_P = torch.arange(block_size, dtype=torch.int32, device=held_LBG.device)
    place_LHP = (held_LBG.flatten(1).unsqueeze(-1) - 1) * block_size + steps_P
    return [InPlace(*layer) for layer in zip(where, head_X, reader_X, open_LH, place_LHP, strict=True)]


class _Layout(NamedTuple):
    """The blocks that all layers read, one layer after the other."""

    size_L: Tensor
    """How many each layer reads."""
    head_X: Tensor
    place_F: Tensor
    """Where the blocks that are held are among them."""


class _Held:
    """The blocks in the tables [L, H, M] of all layers, by layer, head cache and place."""

    def __init__(self, table_LHM: Tensor, held_LH: Tensor) -> None:
        is_held_LHM = torch.arange(table_LHM.shape[-1], device=table_LHM.device) < held_LH.unsqueeze(-1)
        self.num_heads = held_LH.shape[1]
        self.layer_F, self.head_F, _ = is_held_LHM.nonzero(as_tuple=True)
        self.block_F = table_LHM[is_held_LHM].long()
        self.count_L = held_LH.sum(dim=1)
        self.first_L = table_LHM.masked_fill(~is_held_LHM, torch.iinfo(torch.int32).max).amin(dim=(1, 2))
        self.span_L = table_LHM.masked_fill(~is_held_LHM, -1).amax(dim=(1, 2)) + 1 - self.first_L

    def laid_out(self, is_whole_L: Tensor) -> _Layout:
        """A layer reads a whole part of the pool where ``is_whole_L``, else its own blocks alone, in their order."""
        size_L = torch.where(is_whole_L, self.span_L, self.count_L)
        rank_F = torch.arange(len(self.block_F), device=self.block_F.device)
        number_F = torch.where(is_whole_L[self.layer_F], self.block_F, rank_F)
        first_L = torch.where(is_whole_L, self.first_L, self.count_L.cumsum(0) - self.count_L)
        place_F = number_F + (size_L.cumsum(0) - size_L - first_L)[self.layer_F]
        head_X = torch.full((int(size_L.sum()),), self.num_heads, device=self.block_F.device)
        head_X[place_F] = self.head_F
        return _Layout(size_L, head_X, place_F)

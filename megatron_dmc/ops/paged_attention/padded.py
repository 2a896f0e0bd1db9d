"""Attention over a paged cache on a CPU: all head caches copied side by side, padded to the longest. For short ones.

Legend: L layers, B sequences, N query heads, G KV heads, D head dim, P entries per block, M blocks per head cache, E
entries of the longest with the rest of its last block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Padded(NamedTuple):
    """The blocks of all head caches of some sequences in one layer, in order, as many of each."""

    block_BGM: Tensor
    """int32; beyond those that a head cache holds its first again."""
    place_E: Tensor
    """int32 0, 1, 2 ..."""

    def attend(self, q_BND: Tensor, k_blocks: Tensor, v_blocks: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
        """See :meth:`megatron_dmc.ops.paged_attention.on_cpu.DecodePlan.attend`."""
        k_BGED, v_BGED = self._read(k_blocks), self._read(v_blocks)
        is_entry_BGE = self.place_E < cache_seqlens_BG.unsqueeze(-1)
        q_BGRD = q_BND.unflatten(1, (k_BGED.shape[1], -1))
        out_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGED, v_BGED, attn_mask=is_entry_BGE.unsqueeze(2))
        return out_BGRD.reshape(q_BND.shape)

    def _read(self, pool: Tensor) -> Tensor:
        head_caches = (*self.block_BGM.shape[:2], -1, pool.shape[-1])
        return pool.index_select(0, self.block_BGM.flatten()).view(head_caches)


def plan_padded(block_table_LBGM: Tensor, held_LBG: Tensor, block_size: int) -> list[Padded]:
    """What each layer reads, made for all of them at once; arguments as of :func:`in_place.plan_in_place`."""
    column_M = torch.arange(block_table_LBGM.shape[-1], device=held_LBG.device)
    is_held_LBGM = column_M < held_LBG.unsqueeze(-1)
    block_LBGM = torch.where(is_held_LBGM, block_table_LBGM, block_table_LBGM[..., :1])
    place_E = torch.arange(len(column_M) * block_size, dtype=torch.int32, device=held_LBG.device)
    return [Padded(block_BGM, place_E) for block_BGM in block_LBGM]

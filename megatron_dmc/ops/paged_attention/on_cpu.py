"""Which form of decode attention runs on a CPU: a choice between two exact ones, by what they were measured to cost.

Legend: L layers, B sequences, N query heads, G KV heads, D head dim, P entries per block, M blocks per head cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from megatron_dmc.ops.paged_attention.in_place import plan_in_place
from megatron_dmc.ops.paged_attention.padded import plan_padded

PADDED_COST = (30e-6, 200e-12)
"""Seconds of a layer, and of each byte of keys and values after padding: copied, then read."""
IN_PLACE_COST = (95e-6, 115e-12)
"""Seconds of a layer, and of each byte that is held. Both measured on one core of an EPYC 9004 in float32."""


class DecodePlan(Protocol):
    """How one layer reads the cache in a step of decoding. Good as long as the tables stand; lengths may change."""

    def attend(self, q_BND: Tensor, k_blocks: Tensor, v_blocks: Tensor, cache_seqlens_BG: Tensor) -> Tensor:
        """Attention of one query per sequence over its own cache, whose heads have lengths of their own.

        Args:
            q_BND: rotated queries; query head n reads KV head n // (N / G). Scores are scaled by 1 / sqrt(D).
            k_blocks, v_blocks: [number of blocks, P, D] pool of rotated keys and values. What lies beyond the length
                of a head cache counts for nothing, but must be finite in the blocks that it holds.
            cache_seqlens_BG: int32 entries of each head cache, at least 1.

        Returns:
            [B, N, D] in the dtype of ``q_BND``.
        """


def plan_decode(block_table_LBGM: Tensor, held_LBG: Tensor, k_blocks: Tensor) -> Sequence[DecodePlan]:
    """How each layer reads the cache.

    Args:
        block_table_LBGM: int32 blocks of each head cache in order.
        held_LBG: int32 how many of them there are, at least 1; all but the last are full.
        k_blocks: [number of blocks, P, D] one of the pools.
    """
    block_table_LBGM = block_table_LBGM[..., : int(held_LBG.max())]
    block_size, block_bytes = k_blocks.shape[1], 2 * k_blocks[0].nbytes
    padded_bytes, held_bytes = block_table_LBGM.numel() * block_bytes, int(held_LBG.sum()) * block_bytes
    padded, in_place = (
        len(held_LBG) * fixed + per_byte * num_bytes
        for (fixed, per_byte), num_bytes in ((PADDED_COST, padded_bytes), (IN_PLACE_COST, held_bytes))
    )
    plan = plan_padded if padded < in_place else plan_in_place
    return plan(block_table_LBGM, held_LBG, block_size)

"""Attention of a decoding step that changes the cache where it lies: nothing is copied, nothing read by the host.

Rows, positions and blocks are read from tensors whose addresses stay, so that a step can be captured as a CUDA graph
and replayed for other sequences.

Legend: L layers, B sequences, A rows of the cache, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.methods.base import Method
from megatron_dmc.ops.cache_update import FreeBlocks, HeadCaches, NewTokens, update_caches
from megatron_dmc.ops.paged_attention import lengths_of_rows, paged_attention, work_list
from megatron_dmc.ops.rope import cos_sin


class InPlaceAttention:
    """One new token of each sequence, [B, ...], in every layer of one step. No gradients.

    Args:
        method: how the cache is kept; its ``updates_in_place`` is true.
        layers: the head caches of each layer.
        cache_seqlens_LAG: the lengths of all of them.
        rows_B: int64 row of each sequence; on a GPU -1 is none.
        position_B: int64 position of each token.
        inverse_frequencies: of the rotary angles, float32 [D/2].
        free: where blocks are taken; None: tables have room for one entry more.
    """

    def __init__(
        self,
        method: Method,
        layers: Sequence[HeadCaches],
        cache_seqlens_LAG: Tensor,
        rows_B: Tensor,
        position_B: Tensor,
        inverse_frequencies: Tensor,
        free: FreeBlocks | None = None,
    ) -> None:
        assert method.updates_in_place, f"{method.name} needs more than an update in place"
        self.method, self.layers, self.free = method, layers, free
        self.rows_B, self.position_B = rows_B, position_B
        self.cos_BC, self.sin_BC = cos_sin(position_B, inverse_frequencies)
        # Made before anybody knows which heads append: one entry more each.
        length_LBG = lengths_of_rows(cache_seqlens_LAG, rows_B)
        self.work = work_list(torch.where(rows_B.unsqueeze(-1) < 0, 0, length_LBG + 1))

    @torch.no_grad()
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor | None = None) -> Tensor:
        caches = self.layers[layer]
        tokens = NewTokens(q, k, v, self.position_B, self.cos_BC, self.sin_BC)
        q_BND, _ = update_caches(
            tokens,
            caches,
            self.rows_B,
            merging=self.method.merging,
            logits=self.method.shared_logits(q, k),
            neuron_scale=self.method.neuron_scale,
            free=self.free,
        )
        return paged_attention(
            q_BND,
            caches.kv,
            caches.block_table_AGM,
            caches.cache_seqlens_AG,
            rows_B=self.rows_B,
            work=self.work.of_layer(layer),
        )

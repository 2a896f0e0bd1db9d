"""What a step of decoding takes and changes in one layer, in words that kernels understand: tensors and numbers.

Legend: B sequences of the step, N query heads, G KV heads, D head dim, C = D / 2, A rows of the cache, M blocks per
head cache, F blocks, W window_size, K = 2 D + 1 weighted sums.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_dmc.ops.paged_kv import PagedKV


class NewTokens(NamedTuple):
    """One token of each sequence, before RoPE."""

    q_BND: Tensor
    k_BGD: Tensor
    v_BGD: Tensor
    position_B: Tensor
    """int64."""
    cos_BC: Tensor
    """float32 cosine and sine of the rotary angles at the positions."""
    sin_BC: Tensor


class HeadCaches(NamedTuple):
    """The head caches of one layer; all of it changes in place."""

    kv: PagedKV
    """Open entries [A, G, ...] by row."""
    block_table_AGM: Tensor
    """int32 blocks of each head cache in order."""
    cache_seqlens_AG: Tensor
    """int32 entries."""
    state: Tensor | None = None
    """float32 sums of the open segment [A, G, K], or [A, G, W, K] with a window; None where tokens never merge."""


class Merging(NamedTuple):
    """How DMC takes in a token; see :class:`megatron_dmc.config.DMCConfig`."""

    decision_bias: float
    decision_threshold: float
    importance_epsilon: float
    window_size: int


class Logits(NamedTuple):
    """Decision and importance logits that were read elsewhere, float32 [B, G], or [B, 1] for all heads of the layer."""

    decision: Tensor
    importance: Tensor


class FreeBlocks(NamedTuple):
    """A stack of the blocks that nobody holds, on the device."""

    block_F: Tensor
    """int32 blocks; the first ``num_free`` are free."""
    num_free: Tensor
    """int32 of one element; below 0, so many blocks were missing."""

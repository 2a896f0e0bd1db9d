"""One step of decoding in the cache: the one public function, and which form of it runs where.

Legend: see ``head_caches``.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dmc.ops.cache_update import one_step
from megatron_dmc.ops.cache_update.head_caches import FreeBlocks, HeadCaches, Logits, Merging, NewTokens
from megatron_dmc.ops.triton_kernels import load

KERNELS = "megatron_dmc.ops.cache_update.kernels"


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
    """Append one token of each sequence to every head cache of a layer, or merge it into the newest entry, in place.

    The same as ``absorb`` of the dense method and of DMC, and what the cache then writes. In 8 bits an open entry stays
    beside the blocks and is quantised when the next token appends; without open entries every entry is at once.

    Args:
        tokens: before RoPE.
        caches: of all rows; a head cache never has more blocks than it needs, or one more.
        rows_B: int64 row of each sequence, each once. On a GPU -1 is no sequence: nothing happens.
        merging: how tokens merge; None: every token appends.
        logits: for decisions that are not those of one head (DMC-C); None: read from the borrowed channel.
        neuron_scale: factor of the last channel before and after RoPE: 0 where it is borrowed.
        free: where an append takes a block when the last one is full; None: the table has it already. A head cache for
            which none is left stays as it is, and ``free.num_free`` says below 0 how many were missing.

    Returns:
        The rotated queries [B, N, D], and whether each head accumulated, bool [B, G].
    """
    kernels = load("decoding steps in the cache", KERNELS, tokens.q_BND.device.type, tokens.q_BND.dtype)
    form = one_step if kernels is None else kernels
    updated: tuple[Tensor, Tensor] = form.update_caches(
        tokens, caches, rows_B, merging=merging, logits=logits, neuron_scale=neuron_scale, free=free
    )
    return updated

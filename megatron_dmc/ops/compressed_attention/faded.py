"""Causal attention with RoPE while borrowed channels fade: what the stage before compression computes.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dmc.ops.borrowed import EVERY_HEAD, Borrowed
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import masked_attention
from megatron_dmc.ops.rotated import rotated_keys, rotated_queries


def faded_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    neuron_scale: float,
    geometry: Geometry,
    borrowed: Borrowed = EVERY_HEAD,
) -> Tensor:
    """Attention output [T, B, N, D] from projections before RoPE.

    The borrowed channels are multiplied by ``neuron_scale`` before and after RoPE; 1 is the attention of Llama, 0 that
    of a method that takes decisions, where it never accumulates or evicts.

    Raises:
        ValueError: see :func:`megatron_dmc.ops.masked_attention.masked_attention`.
    """
    q_TBND = rotated_queries(q_TBND, k_SBGD.shape[2], geometry, neuron_scale, borrowed)
    k_SBGD = rotated_keys(k_SBGD, geometry, neuron_scale, borrowed)
    return masked_attention(q_TBND, k_SBGD, v_SBGD, None, geometry, free_window=None)

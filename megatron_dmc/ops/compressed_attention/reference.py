"""The whole operation as its parts in sequence, each in its plain form, differentiated by autograd.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from torch import Tensor

from megatron_dmc.ops.compressed_attention.weights import Weights
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.kv_pooling import reference as pooling
from megatron_dmc.ops.masked_attention import reference as attention
from megatron_dmc.ops.rope import apply_rope, without_last_channel


def compressed_attention(
    q_TBND: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, weights_SBG: Weights, geometry: Geometry, *, window_size: int
) -> Tensor:
    """The function of the same name in the package."""
    alpha, omega, key_bias = weights_SBG
    k_SBGD, v_SBGD = pooling.pool_kv(k_SBGD, v_SBGD, alpha, omega, window_size)
    return attention.masked_attention(
        rotated(q_TBND, *(x[geometry.query_T] for x in geometry.cos_sin_S)),
        rotated(k_SBGD, *geometry.cos_sin_S),
        v_SBGD,
        key_bias,
        geometry,
        free_window=0,
    )


def rotated(x_SBHD: Tensor, cos_SC: Tensor, sin_SC: Tensor) -> Tensor:
    """RoPE with the borrowed channel zero before and after it."""
    x_SBHD = apply_rope(without_last_channel(x_SBHD), cos_SC[:, None, None], sin_SC[:, None, None])
    return without_last_channel(x_SBHD)

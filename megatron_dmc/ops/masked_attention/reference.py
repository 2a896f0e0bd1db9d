"""Masked attention with all scores in one matrix: plain, quadratic in memory, differentiated by autograd.

Shapes: S sequence of keys, T queries, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.precision import accumulation_dtype


def masked_attention(
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    key_bias_SBG: Tensor | None,
    geometry: Geometry,
    *,
    free_window: int | None = 0,
) -> Tensor:
    """The attention of :func:`megatron_dmc.ops.masked_attention.masked_attention`, and its arguments."""
    dtype = accumulation_dtype(q_TBND.dtype)
    length, batch, num_kv_heads, head_dim = k_SBGD.shape
    group = q_TBND.shape[2] // num_kv_heads
    q, k, v = (x.to(dtype) for x in (q_TBND, k_SBGD, v_SBGD))
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("tbnd,sbnd->bnts", q, k) * head_dim**-0.5
    i_T1 = geometry.query_T.to(k.device)[:, None]
    j_S = torch.arange(length, device=k.device)
    if key_bias_SBG is not None and free_window is not None:
        bias_BNS = key_bias_SBG.to(dtype).permute(1, 2, 0).repeat_interleave(group, 1)
        scores = scores + bias_BNS[:, :, None].where(i_T1 - j_S > free_window, 0.0)
    visible_BTS = (j_S <= i_T1).expand(batch, -1, -1)
    if geometry.documents is not None:
        number_BS = torch.stack([_document_numbers(length, starts) for starts in geometry.documents]).to(k.device)
        visible_BTS = visible_BTS & (number_BS[:, i_T1[:, 0], None] == number_BS[:, None])
    weights = scores.masked_fill(~visible_BTS[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bnts,sbnd->tbnd", weights, v).to(q_TBND.dtype)


def _document_numbers(length: int, starts: Sequence[int]) -> Tensor:
    return torch.bucketize(torch.arange(length), torch.tensor(starts), right=True)

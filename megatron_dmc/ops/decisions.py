"""Learned decisions, read from borrowed channels or an adapter: the same code in training, evaluation and decoding.

DMC: the last channel of a key before RoPE carries the decision logit, the last channel of a query the importance
logit ([DMC] arXiv 2403.09636, section 3.1). DMS: the last channel of the first query head of each KV head carries the
decision logit, or an adapter makes it from the hidden state ([DMS] arXiv 2506.05345, section 3, and its code). Logits
are float32 whatever the dtype of the model (float64 stays).

Shapes: S sequence, B batch, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.borrowed import ADAPTER_SCALE
from megatron_dmc.ops.precision import accumulation_dtype


def decision_logits(k_SBGD: Tensor, decision_bias: float) -> Tensor:
    """Decision logits [S, B, G] from keys before RoPE: positive accumulates, else append."""
    return k_SBGD[..., -1].to(accumulation_dtype(k_SBGD.dtype)) - decision_bias


def first_query_logits(q_SBND: Tensor, num_kv_heads: int, decision_bias: float) -> Tensor:
    """Decision logits [S, B, G] from queries before RoPE: positive evicts, else keep."""
    channel = q_SBND[..., -1].unflatten(-1, (num_kv_heads, -1))[..., 0]
    return channel.to(accumulation_dtype(q_SBND.dtype)) - decision_bias


def adapter_logits(adapter_SBG: Tensor, decision_bias: float) -> Tensor:
    """Decision logits [S, B, G] from the output of an adapter: positive evicts, else keep."""
    return ADAPTER_SCALE * adapter_SBG.to(accumulation_dtype(adapter_SBG.dtype)) - decision_bias


def importance_logits(q_SBND: Tensor, num_kv_heads: int, decision_bias: float) -> Tensor:
    """Importance logits [S, B, G] from queries before RoPE: the mean over the query heads of each KV head."""
    channel = q_SBND[..., -1].to(accumulation_dtype(q_SBND.dtype))
    return channel.unflatten(-1, (num_kv_heads, -1)).mean(-1) + decision_bias


def importance(importance_logits: Tensor, epsilon: float) -> Tensor:
    """Weight omega of a token inside its segment, in (epsilon, 1 + epsilon)."""
    return torch.sigmoid(importance_logits) + epsilon


def relaxed_logits(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Logits of the Gumbel-sigmoid ([DMC] eq. 8); ``noise`` is logistic, the difference of two Gumbel samples."""
    return (logits + noise) / temperature


def hard_decisions(logits: Tensor, threshold: float) -> Tensor:
    """True where a token accumulates (DMC) or is evicted (DMS), False where one appends or is kept."""
    return logits > threshold

"""Dynamic Memory Compression: each KV head decides for every token whether to merge it into its newest entry.

Source: [DMC] arXiv 2403.09636. Two forms of one function: ``noise`` given is the relaxation that is trained
(section 3.2), ``noise=None`` takes hard decisions and equals decoding token by token with the compressed cache.

``decisions_per="layer"`` is DMC-C, whose definition is ours: the decision logit of a layer is the mean over its KV
heads, the importance logit the mean over its query heads. Logits then have one head, G = 1; under tensor parallelism
the mean over the ranks is still to be taken by the caller.

Shapes: S sequence, T queries, B batch, N query heads, G KV heads (1 for logits of DMC-C), D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops import compressed_attention as ops
from megatron_dmc.ops import decisions
from megatron_dmc.ops.compressed_attention import faded_attention
from megatron_dmc.ops.masked_attention import HIDDEN, plan_attention

__all__ = [
    "compressed_attention",
    "decision_fraction",
    "decision_weights",
    "faded_attention",
    "first_positions",
    "num_decision_heads",
    "read_logits",
]


def read_logits(q_SBND: Tensor, k_SBGD: Tensor, config: DMCConfig) -> tuple[Tensor, Tensor]:
    """Decision and importance logits, float32 [S, B, G], from queries and keys before RoPE.

    With one decision per layer [S, B, 1]: means over the heads given, of which all ranks have equally many, so that
    the mean over tensor-parallel ranks is that of the layer.
    """
    decision = decisions.decision_logits(k_SBGD, config.decision_bias)
    importance = decisions.importance_logits(q_SBND, k_SBGD.shape[2], config.decision_bias)
    if config.decisions_per == "layer":
        return decision.mean(-1, keepdim=True), importance.mean(-1, keepdim=True)
    return decision, importance


def num_decision_heads(num_kv_heads: int, config: DMCConfig) -> int:
    """Decisions per token in a layer of ``num_kv_heads``: what the noise is drawn for."""
    return 1 if config.decisions_per == "layer" else num_kv_heads


def compressed_attention(  # noqa: PLR0913
    q_TBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    decision_logits_SBG: Tensor,
    importance_logits_SBG: Tensor,
    config: DMCConfig,
    *,
    cos_sin_S: ops.CosSin,
    noise_SBG: Tensor | None,
    query_starts: Sequence[int] | None = None,
    documents: Sequence[Sequence[int]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed cache, from projections before RoPE.

    Args:
        q_TBND: queries with the importance channel inside; the whole sequence, or chunks of it.
        k_SBGD: keys of the whole sequence with the decision channel inside.
        v_SBGD: values of the whole sequence.
        decision_logits_SBG, importance_logits_SBG: of :func:`read_logits`, for the whole sequence.
        config: settings of the method.
        cos_sin_S: cosine and sine of all positions, float32 [S, D/2].
        noise_SBG: logistic noise of the relaxation; None takes hard decisions.
        query_starts: positions at which the equally long chunks of the queries start; None: the whole sequence.
        documents: ascending start positions of the documents of each batch row; no segment and no attention
            crosses a border. None: one document per row.

    Returns:
        Output [T, B, N, D] and the hard decisions [S, B, G] as bool, False at the first position of each document.

    Raises:
        ValueError: shapes, chunks or documents that do not fit together.
    """
    _check_logits(k_SBGD, decision_logits_SBG, importance_logits_SBG, noise_SBG)
    plan = plan_attention(q_TBND, k_SBGD, free_window=0, query_starts=query_starts, documents=documents)
    weights, hard_SBG = decision_weights(decision_logits_SBG, importance_logits_SBG, noise_SBG, config, documents)
    weights = ops.Weights(*(x.expand(k_SBGD.shape[:-1]) for x in weights))
    output = ops.compressed_attention(
        q_TBND, k_SBGD, v_SBGD, weights, cos_sin_S=cos_sin_S, window_size=config.window_size, plan=plan
    )
    return output, hard_SBG.expand(k_SBGD.shape[:-1])


def decision_weights(
    decision_logits_SBG: Tensor,
    importance_logits_SBG: Tensor,
    noise_SBG: Tensor | None,
    config: DMCConfig,
    documents: Sequence[Sequence[int]] | None = None,
) -> tuple[ops.Weights, Tensor]:
    """Decisions, importances and key biases as numbers, and the hard decisions as bool, all [S, B, G].

    Arguments as in :func:`compressed_attention`. The first position of every document appends.
    """
    logits, threshold = decision_logits_SBG, config.decision_threshold
    if noise_SBG is not None:
        logits, threshold = decisions.relaxed_logits(logits, noise_SBG, config.temperature), 0.0
    first_SB1 = first_positions(logits.shape[0], logits.shape[1], documents).to(logits.device)[..., None]
    hard_SBG = decisions.hard_decisions(logits.detach(), threshold).masked_fill(first_SB1, False)
    if noise_SBG is None:
        alpha = hard_SBG.to(logits.dtype)
        own_bias = HIDDEN * alpha
    else:
        alpha = torch.sigmoid(logits).masked_fill(first_SB1, 0.0)
        own_bias = F.logsigmoid(-logits).masked_fill(first_SB1, 0.0)
    # A key is hidden by the decision of the position after it; nothing comes after the last one.
    key_bias = F.pad(own_bias[1:], (0, 0, 0, 0, 0, 1))
    omega = decisions.importance(importance_logits_SBG, config.importance_epsilon)
    return ops.Weights(alpha, omega, key_bias), hard_SBG


def decision_fraction(decision_logits_SBG: Tensor, noise_SBG: Tensor | None, config: DMCConfig) -> Tensor:
    """Share of positions that accumulate, [B, G], for the compression loss ([DMC] eq. 11).

    The value is that of the hard decisions, the gradient that of the relaxed ones (straight through; none without
    noise). Every position counts with the decision its logit takes, the first of a sequence too, although it
    appends whatever its logit says: so does the authors' code.
    """
    if noise_SBG is None:
        hard = decisions.hard_decisions(decision_logits_SBG, config.decision_threshold)
        return hard.to(decision_logits_SBG.dtype).mean(0)
    logits = decisions.relaxed_logits(decision_logits_SBG, noise_SBG, config.temperature)
    relaxed = torch.sigmoid(logits).mean(0)
    hard = decisions.hard_decisions(logits.detach(), 0.0).to(logits.dtype).mean(0)
    return hard + (relaxed - relaxed.detach())


def first_positions(length: int, batch: int, documents: Sequence[Sequence[int]] | None) -> Tensor:
    """True [S, B] at the first position of the sequence and of every document."""
    first_SB = torch.zeros(length, batch, dtype=torch.bool)
    first_SB[0] = True
    for row, starts in enumerate(documents or ()):
        first_SB[list(starts), row] = True
    return first_SB


def _check_logits(k_SBGD: Tensor, decision_SBG: Tensor, importance_SBG: Tensor, noise_SBG: Tensor | None) -> None:
    length, batch, num_kv_heads, _ = k_SBGD.shape
    allowed = {(length, batch, num_kv_heads), (length, batch, 1)}
    given = {"decision logits": decision_SBG, "importance logits": importance_SBG}
    for name, logits in given.items():
        if tuple(logits.shape) not in allowed:
            raise ValueError(f"{name} {tuple(logits.shape)}: must be [S, B, G] like the keys, or [S, B, 1]: {allowed}")
    if noise_SBG is not None and noise_SBG.shape != decision_SBG.shape:
        raise ValueError(
            f"noise {tuple(noise_SBG.shape)}: must be that of the decision logits {tuple(decision_SBG.shape)}"
        )

"""What a model says of given texts: at once with hard decisions, or token by token through the compressed cache.

Legend: S sequence, B batch, L layers, G KV heads, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.decoder.layer_attention import DecisionTrace
from megatron_dmc.ops.kv_quantization import AUTO
from megatron_dmc.support.progress import Advance

LOGITS_AT_ONCE = 1 << 24
"""Logits that exist at one time: 64 MiB in float32."""


class Storage(NamedTuple):
    """How decoding stores its cache; see :meth:`Decoder.new_cache`."""

    block_size: int = DEFAULT_BLOCK_SIZE
    kv_dtype: str = AUTO.name


DEFAULT_STORAGE = Storage()


class Reference(NamedTuple):
    """Another model of the same vocabulary, and what it made of a batch."""

    model: Decoder
    hidden_SBH: Tensor

    @classmethod
    def read(cls, model: Decoder, token_TB: Tensor) -> Reference:
        """Let it read whole sequences, as in :func:`score_whole`."""
        return cls(model, model.forward(token_TB[:-1]))


class Divergence(NamedTuple):
    """How far a model's distribution of the next token is from a reference's, [S, B]."""

    kl_SB: Tensor
    """float32 KL(reference || model), nats."""
    same_top_SB: Tensor
    """bool: both hold the same token for the most likely one."""
    reference_log_prob_SB: Tensor
    """float32, of the token that follows."""


@dataclass(frozen=True)
class Scores:
    """One batch of sequences through one path."""

    log_prob_SB: Tensor
    """float32, of the token that follows each position."""
    decision_logit_LSBG: Tensor | None
    """float32; None for a model that does not compress."""
    alpha_LSBG: Tensor | None
    entries_S: Tensor
    """int64, entries of all sequences, layers and KV heads after each position: counted from the decisions, or held
    by the cache (where prefilled, only the last position of the prefix is known; those before are -1)."""
    entries_LG: Tensor
    """int64, entries of all sequences after the last position."""
    usage: CacheUsage | None = None
    """What the cache held at the end; None without a cache."""
    blocks_S: Tensor | None = None
    """int64, blocks of all head caches after each position, known where ``entries_S`` is; None without a cache."""
    divergence: Divergence | None = None
    """From the reference; None without one."""


def score_whole(model: Decoder, token_TB: Tensor, reference: Reference | None = None) -> Scores:
    """Whole sequences at once; no cache.

    Args:
        token_TB: int64 [S + 1, B]; the last row is only predicted.
        reference: read from the same tokens, to measure the divergence from it.
    """
    trace = DecisionTrace()
    hidden_SBH = model.forward(token_TB[:-1], trace)
    log_prob_SB, divergence = _judge(model, hidden_SBH, token_TB[1:], reference)
    logit_LSBG, alpha_LSBG = _stacked(trace)
    if alpha_LSBG is None:
        heads = (model.config.num_layers, model.config.num_kv_heads)
        added_LSG = torch.full((heads[0], len(log_prob_SB), heads[1]), log_prob_SB.shape[1], device=token_TB.device)
    else:
        added_LSG = _entries_added(alpha_LSBG, model.method.decision_delay)
    entries_S, entries_LG = added_LSG.sum(dim=(0, 2)).cumsum(dim=0), added_LSG.sum(dim=1)
    return Scores(log_prob_SB, logit_LSBG, alpha_LSBG, entries_S, entries_LG, divergence=divergence)


def _entries_added(alpha_LSBG: Tensor, delay: int) -> Tensor:
    """int64 [L, S, G]: entries that each position adds over all sequences; a decision saves one ``delay`` later."""
    saved_LSBG = torch.zeros_like(alpha_LSBG)
    saved_LSBG[:, delay:] = alpha_LSBG[:, : max(0, alpha_LSBG.shape[1] - delay)]
    return (~saved_LSBG).sum(dim=2)


def score_decode(
    model: Decoder,
    token_TB: Tensor,
    reference: Reference | None = None,
    *,
    prefill_length: int = 0,
    storage: Storage = DEFAULT_STORAGE,
    advance: Advance | None = None,
) -> Scores:
    """Token by token through the compressed cache.

    Args:
        token_TB, reference: as in :func:`score_whole`.
        prefill_length: tokens that are read in one pass before; at most S.
        storage: of the cache.
        advance: called with the number of tokens after each pass.
    """
    inputs_SB = token_TB[:-1]
    sequence_length, batch = inputs_SB.shape
    cache = model.new_cache(batch, **storage._asdict())
    rows = cache.add_sequences(batch)
    hidden, traces = [], []
    entries_S = torch.full((sequence_length,), -1, device=token_TB.device)
    blocks_S = entries_S.clone()
    position = 0
    while position < sequence_length:
        count = max(prefill_length, 1) if position == 0 else 1
        token_SB = inputs_SB[position : position + count]
        trace = DecisionTrace()
        hidden_TH = model.read(token_SB.T.flatten(), [count] * batch, cache, rows, trace=trace)
        hidden.append(_unpacked(hidden_TH, batch))
        traces.append([[_unpacked(x, batch) for x in layers] for layers in (trace.logits, trace.alpha)])
        position += count
        entries_S[position - 1] = cache.cache_seqlens.sum()
        blocks_S[position - 1] = cache.held_blocks.sum()
        if advance is not None:
            advance(batch * count)
    log_prob_SB, divergence = _judge(model, torch.cat(hidden), token_TB[1:], reference)
    logit_LSBG, alpha_LSBG = (
        torch.cat([torch.stack(layers) for layers in passes], dim=1) if passes[0] else None
        for passes in zip(*traces, strict=True)
    )
    usage = CacheUsage.of(cache, rows)
    entries_LG = torch.tensor(usage.entries)
    return Scores(log_prob_SB, logit_LSBG, alpha_LSBG, entries_S, entries_LG, usage, blocks_S, divergence)


def _unpacked(packed: Tensor, batch: int) -> Tensor:
    """[S, B, ...] from equally long sequences that are packed one after the other."""
    return packed.unflatten(0, (batch, -1)).transpose(0, 1)


@torch.no_grad()
def _judge(
    model: Decoder, hidden_SBH: Tensor, target_SB: Tensor, reference: Reference | None
) -> tuple[Tensor, Divergence | None]:
    """Log-probabilities of the targets, float32 [S, B], and the divergence from a reference.

    Logits are made for a part of the positions at a time: a long text over a large vocabulary has too many.
    """
    positions = max(1, LOGITS_AT_ONCE // (model.config.vocab_size * target_SB.shape[1]))
    hidden_parts, target_parts = hidden_SBH.split(positions), target_SB.split(positions)
    if reference is None:
        parts = zip(hidden_parts, target_parts, strict=True)
        return torch.cat([_chosen(model.logits(hidden), target) for hidden, target in parts]), None
    log_probs, divergences = [], []
    for hidden, target, other in zip(hidden_parts, target_parts, reference.hidden_SBH.split(positions), strict=True):
        logits = model.logits(hidden)
        log_probs.append(_chosen(logits, target))
        divergences.append(_diverge(logits, reference.model.logits(other), target))
    return torch.cat(log_probs), Divergence(*map(torch.cat, zip(*divergences, strict=True)))


def _chosen(logits_SBV: Tensor, target_SB: Tensor) -> Tensor:
    """Log-probabilities of the targets."""
    return logits_SBV.gather(-1, target_SB.unsqueeze(-1)).squeeze(-1) - logits_SBV.logsumexp(dim=-1)


def _diverge(logits_SBV: Tensor, reference_SBV: Tensor, target_SB: Tensor) -> Divergence:
    log_prob_SB = _chosen(reference_SBV, target_SB)
    same_top_SB = logits_SBV.argmax(dim=-1) == reference_SBV.argmax(dim=-1)
    log_q_SBV, log_p_SBV = logits_SBV.log_softmax(dim=-1), reference_SBV.log_softmax(dim=-1)
    # Never below 0, but for rounding.
    kl_SB = (log_p_SBV.exp() * (log_p_SBV - log_q_SBV)).sum(dim=-1).clamp(min=0)
    return Divergence(kl_SB, same_top_SB, log_prob_SB)


def _stacked(trace: DecisionTrace) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Logits and decisions [L, S, B, G]; None for a model that takes none."""
    if not trace.alpha:
        return None, None
    return torch.stack(trace.logits), torch.stack(trace.alpha)

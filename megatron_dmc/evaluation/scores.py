"""What a model says of given texts: at once with hard decisions, or token by token through the compressed cache.

Legend: S sequence, B batch, L layers, G KV heads, V vocabulary.
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


def score_whole(model: Decoder, token_TB: Tensor) -> Scores:
    """Whole sequences at once; no cache.

    Args:
        token_TB: int64 [S + 1, B]; the last row is only predicted.
    """
    trace = DecisionTrace()
    hidden_SBH = model.forward(token_TB[:-1], trace)
    log_prob_SB = _next_log_probs(model, hidden_SBH, token_TB[1:])
    logit_LSBG, alpha_LSBG = _stacked(trace)
    if alpha_LSBG is None:
        heads = (model.config.num_layers, model.config.num_kv_heads)
        added_LSG = torch.full((heads[0], len(log_prob_SB), heads[1]), log_prob_SB.shape[1], device=token_TB.device)
    else:
        added_LSG = _entries_added(alpha_LSBG, model.method.decision_delay)
    return Scores(log_prob_SB, logit_LSBG, alpha_LSBG, added_LSG.sum(dim=(0, 2)).cumsum(dim=0), added_LSG.sum(dim=1))


def _entries_added(alpha_LSBG: Tensor, delay: int) -> Tensor:
    """int64 [L, S, G]: entries that each position adds over all sequences; a decision saves one ``delay`` later."""
    saved_LSBG = torch.zeros_like(alpha_LSBG)
    saved_LSBG[:, delay:] = alpha_LSBG[:, : max(0, alpha_LSBG.shape[1] - delay)]
    return (~saved_LSBG).sum(dim=2)


def score_decode(
    model: Decoder,
    token_TB: Tensor,
    *,
    prefill_length: int = 0,
    storage: Storage = DEFAULT_STORAGE,
    advance: Advance | None = None,
) -> Scores:
    """Token by token through the compressed cache.

    Args:
        token_TB: as in :func:`score_whole`.
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
        if advance is not None:
            advance(batch * count)
    log_prob_SB = _next_log_probs(model, torch.cat(hidden), token_TB[1:])
    logit_LSBG, alpha_LSBG = (
        torch.cat([torch.stack(layers) for layers in passes], dim=1) if passes[0] else None
        for passes in zip(*traces, strict=True)
    )
    usage = CacheUsage.of(cache, rows)
    return Scores(log_prob_SB, logit_LSBG, alpha_LSBG, entries_S, torch.tensor(usage.entries), usage)


def _unpacked(packed: Tensor, batch: int) -> Tensor:
    """[S, B, ...] from equally long sequences that are packed one after the other."""
    return packed.unflatten(0, (batch, -1)).transpose(0, 1)


@torch.no_grad()
def _next_log_probs(model: Decoder, hidden_SBH: Tensor, target_SB: Tensor) -> Tensor:
    """float32 [S, B]; logits are made for a part of the positions at a time."""
    positions = max(1, LOGITS_AT_ONCE // (model.config.vocab_size * target_SB.shape[1]))
    parts = []
    for hidden, target in zip(hidden_SBH.split(positions), target_SB.split(positions), strict=True):
        logits = model.logits(hidden)
        chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        parts.append(chosen - logits.logsumexp(dim=-1))
    return torch.cat(parts)


def _stacked(trace: DecisionTrace) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Logits and decisions [L, S, B, G]; None for a model that takes none."""
    if not trace.alpha:
        return None, None
    return torch.stack(trace.logits), torch.stack(trace.alpha)

"""How likely a model finds given continuations, through its cache: batched by length, without padding.

Two paths. ``teacher-forced`` reads context and continuation in one pass, with the decisions of that pass. ``decode``
reads the contexts in one pass and the continuations token by token, which is what generating them would do; methods
that evict by attention show nothing of it otherwise, since they read a prompt densely.

Legend: T packed tokens, K scored tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.evaluation.perplexity import DECODE, TEACHER_FORCED
from megatron_dmc.evaluation.scores import DEFAULT_STORAGE, LOGITS_AT_ONCE, Storage
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.support.progress import Advance

TOKENS_AT_ONCE = 8192
"""Of one batch, whatever its number of texts."""


class Continuation(NamedTuple):
    """A text in two parts, both of at least one token."""

    context: Sequence[int]
    target: Sequence[int]

    @property
    def inputs(self) -> list[int]:
        """What the model reads: all but the last token."""
        return [*self.context, *self.target[:-1]]


class Likelihood(NamedTuple):
    """What the model says of a continuation."""

    log_prob: float
    """Of all its tokens together, nats."""
    is_greedy: bool
    """Whether each of them is the most likely one in its place."""


@dataclass
class Scorer:
    """Scores continuations with one model.

    Args:
        model: of any method.
        path: ``teacher-forced`` or ``decode``; None: the former where the method allows it.
        batch_size: texts at once, at most.
        storage: of the cache.

    Attributes:
        num_truncated: texts so far whose beginning was longer than the model reads, and was left out.
        usages: what the cache held at the end of every batch.

    Raises:
        ValueError: a path that there is not, or that the method lacks, or a batch size below 1.
    """

    model: Decoder
    path: str | None = None
    batch_size: int = 32
    storage: Storage = DEFAULT_STORAGE
    num_truncated: int = 0
    usages: list[CacheUsage] = field(default_factory=list)

    def __post_init__(self) -> None:
        method = self.model.method
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        self.path = self.path or (TEACHER_FORCED if method.has_whole_form else DECODE)
        if self.path not in (TEACHER_FORCED, DECODE):
            raise ValueError(f"path={self.path!r}: continuations are scored by {TEACHER_FORCED} or {DECODE}")
        if self.path == TEACHER_FORCED and not method.has_whole_form:
            raise ValueError(f"path={self.path!r}: {method.name} decides token by token, score it with path={DECODE!r}")

    def score(self, pairs: Sequence[Continuation], advance: Advance | None = None) -> list[Likelihood]:
        """One result each, in their order.

        Args:
            pairs: texts.
            advance: called with numbers of texts.
        """
        cut = [self._cut(pair) for pair in pairs]
        found: dict[int, Likelihood] = {}
        for batch in _batches(cut, self.batch_size):
            likelihoods = self._score_batch([cut[index] for index in batch])
            found |= dict(zip(batch, likelihoods, strict=True))
            if advance is not None:
                advance(len(batch))
        return [found[index] for index in range(len(pairs))]

    def _cut(self, pair: Continuation) -> Continuation:
        """The end of a text that is too long for the model."""
        excess = len(pair.inputs) - self.model.config.max_position_embeddings
        if excess <= 0:
            return pair
        self.num_truncated += 1
        if excess >= len(pair.context):
            raise ValueError(f"a continuation of {len(pair.target)} tokens is longer than the model reads")
        return Continuation(pair.context[excess:], pair.target)

    @torch.no_grad()
    def _score_batch(self, batch: Sequence[Continuation]) -> list[Likelihood]:
        hidden_KH = self._read_whole(batch) if self.path == TEACHER_FORCED else self._read_stepwise(batch)
        targets = [token for pair in batch for token in pair.target]
        log_prob_K, is_top_K = self._judge(hidden_KH, torch.tensor(targets, device=self.model.device))
        lengths = [len(pair.target) for pair in batch]
        parts = zip(log_prob_K.double().split(lengths), is_top_K.split(lengths), strict=True)
        return [Likelihood(log_prob.sum().item(), bool(is_top.all())) for log_prob, is_top in parts]

    def _read_whole(self, batch: Sequence[Continuation]) -> Tensor:
        """Hidden states before every scored token, those of one text after those of another."""
        counts = [len(pair.inputs) for pair in batch]
        cache = self.model.new_cache(len(batch), **self.storage._asdict())
        rows = cache.add_sequences(len(batch))
        hidden_TH = self.model.read(self._packed([pair.inputs for pair in batch]), counts, cache, rows)
        self.usages.append(CacheUsage.of(cache, rows))
        scored = [hidden[-len(pair.target) :] for hidden, pair in zip(hidden_TH.split(counts), batch, strict=True)]
        return torch.cat(scored)

    def _read_stepwise(self, batch: Sequence[Continuation]) -> Tensor:
        """As :meth:`_read_whole`, with one pass for the contexts and one for every further token."""
        counts = [len(pair.context) for pair in batch]
        cache = self.model.new_cache(len(batch), **self.storage._asdict())
        rows = cache.add_sequences(len(batch))
        hidden_TH = self.model.read(self._packed([pair.context for pair in batch]), counts, cache, rows)
        states = [[hidden[-1]] for hidden in hidden_TH.split(counts)]
        for step in range(max(len(pair.target) for pair in batch) - 1):
            going_on = [index for index, pair in enumerate(batch) if step < len(pair.target) - 1]
            tokens = self._packed([[batch[index].target[step]] for index in going_on])
            hidden_BH = self.model.read(tokens, [1] * len(going_on), cache, [rows[index] for index in going_on])
            for index, hidden_H in zip(going_on, hidden_BH, strict=True):
                states[index].append(hidden_H)
        self.usages.append(CacheUsage.of(cache, rows))
        return torch.stack([hidden_H for text in states for hidden_H in text])

    def _packed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([token for text in texts for token in text], device=self.model.device)

    def _judge(self, hidden_KH: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target, and whether it is the most likely token; a part of the logits at a time."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        log_probs, tops = [], []
        for hidden, target in zip(hidden_KH.split(at_once), target_K.split(at_once), strict=True):
            logits = self.model.logits(hidden)
            chosen = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
            log_probs.append(chosen - logits.logsumexp(dim=-1))
            tops.append(logits.argmax(dim=-1) == target)
        return torch.cat(log_probs), torch.cat(tops)


def _batches(pairs: Sequence[Continuation], batch_size: int) -> Iterator[list[int]]:
    """Places of texts of like lengths, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(pairs)), key=lambda index: -len(pairs[index].inputs))
    batch: list[int] = []
    num_tokens = 0
    for index in order:
        length = len(pairs[index].inputs)
        if batch and (len(batch) == batch_size or num_tokens + length > TOKENS_AT_ONCE):
            yield batch
            batch, num_tokens = [], 0
        batch.append(index)
        num_tokens += length
    if batch:
        yield batch

"""Perplexity and measured compression on held-out text, teacher-forced, through the compressed cache, or both.

Legend: N sequences, S positions of a sequence, T = S + 1 tokens (the last is only predicted), B batch, L layers, G KV
heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.evaluation.against_reference import AgainstReference, ReferenceSums
from megatron_dmc.evaluation.agreement import Agreement
from megatron_dmc.evaluation.estimate import Estimate, perplexity_of
from megatron_dmc.evaluation.scores import DEFAULT_STORAGE, Reference, Scores, Storage, score_decode, score_whole
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.ops.kv_quantization import AUTO, find_kv_format
from megatron_dmc.support.progress import Advance

TEACHER_FORCED, DECODE, BOTH = "teacher-forced", "decode", "both"
PATHS = (TEACHER_FORCED, DECODE, BOTH)
CURVE_POINTS = 256
"""At most so many points of the curve of entries over tokens."""


@dataclass(frozen=True)
class PathResult:
    """What one path measured."""

    loss: float
    """Mean negative log-probability of the next token, nats."""
    standard_error: float
    """Of the loss, over sequences; 0 for a single one."""
    seconds: float
    compression_ratio: float
    """Entries without / with compression at the end of the sequences."""
    compression_ratio_per_layer_and_kv_head: list[list[float]]
    entries_over_tokens: list[tuple[int, float]]
    """(tokens seen, entries per sequence over all layers and KV heads): held by the cache, or counted where there is
    none."""
    mean_resident_entries: float
    """Entries per layer and KV head, as a mean over sequences and positions (those of a prefill left out): what methods
    of a fixed budget and of a ratio are compared by."""
    mean_resident_ratio: float
    """What an uncompressed cache holds at the same positions, divided by it."""
    mean_resident_bytes: float | None
    """Bytes of the blocks and the state of one sequence over all layers and heads, as the same mean; None without a
    cache."""
    cache: CacheUsage | None
    """What the cache held at the end of all sequences; None without a cache."""
    against_reference: AgainstReference | None = None
    """None without a reference."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity_of(self.loss)

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "loss_standard_error": self.standard_error,
            "seconds": self.seconds,
            "compression_ratio": self.compression_ratio,
            "compression_ratio_per_layer_and_kv_head": self.compression_ratio_per_layer_and_kv_head,
            "entries_over_tokens": [list(point) for point in self.entries_over_tokens],
            "mean_resident_entries": self.mean_resident_entries,
            "mean_resident_ratio": self.mean_resident_ratio,
            "mean_resident_bytes": self.mean_resident_bytes,
            "cache": None if self.cache is None else self.cache.to_dict(),
            "against_reference": None if self.against_reference is None else self.against_reference.to_dict(),
        }


@dataclass(frozen=True)
class Evaluation:
    """Both paths, as far as they were taken, over the same sequences."""

    num_sequences: int
    seq_length: int
    dtype: str
    teacher_forced: PathResult | None
    decode: PathResult | None
    agreement: Agreement | None

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        parts = {"teacher_forced": self.teacher_forced, "decode": self.decode, "agreement": self.agreement}
        return {
            "num_sequences": self.num_sequences,
            "seq_length": self.seq_length,
            "num_tokens": self.num_sequences * self.seq_length,
            "dtype": self.dtype,
            **{name: None if part is None else part.to_dict() for name, part in parts.items()},
        }


@dataclass(frozen=True)
class SoFar:
    """What is known in the course of an evaluation."""

    num_sequences: int
    perplexity: float
    """Of the teacher-forced path where it is taken, else of decoding."""
    seconds: float
    """Since the beginning: of all paths, and of the reference."""

    @staticmethod
    def of(sums: _Sums, seconds: float) -> SoFar:
        """From what one path has measured."""
        loss_N = torch.cat(sums.loss_N)
        return SoFar(len(loss_N), perplexity_of(loss_N.mean().item()), seconds)


class Watch(NamedTuple):
    """Who is told how far an evaluation is."""

    advance: Advance | None = None
    """Called with numbers of tokens as decoding (or else the teacher-forced path) goes on."""
    after_batch: Callable[[SoFar], None] | None = None
    """Called with what is known after each batch."""


NOBODY = Watch()


def cut_sequences(tokens: np.ndarray, seq_length: int, num_sequences: int | None) -> Tensor:
    """Non-overlapping sequences from a stream of tokens, int64 [N, T].

    Args:
        tokens: the stream, one-dimensional, of any integer type.
        seq_length: S, tokens read per sequence.
        num_sequences: the first so many; None takes all.

    Raises:
        ValueError: the stream is shorter than one sequence, or a size is below 1.
    """
    if seq_length < 1 or (num_sequences is not None and num_sequences < 1):
        raise ValueError(f"seq_length={seq_length}, sequences={num_sequences}: must be at least 1")
    available = (len(tokens) - 1) // seq_length
    if available < 1:
        raise ValueError(
            f"the data has {len(tokens)} tokens, one sequence needs {seq_length + 1}: give more data or a smaller "
            "--seq-length"
        )
    count = available if num_sequences is None else min(available, num_sequences)
    stream = torch.from_numpy(tokens[: count * seq_length + 1].astype(np.int64))
    return stream.unfold(0, seq_length + 1, seq_length)


def evaluate(
    model: Decoder,
    token_NT: Tensor,
    *,
    path: str = BOTH,
    batch_size: int = 32,
    prefill_length: int = 0,
    storage: Storage = DEFAULT_STORAGE,
    reference: Decoder | None = None,
    watch: Watch = NOBODY,
) -> Evaluation:
    """Measure a model on sequences.

    Args:
        model: compressing or not.
        token_NT: int64, see :func:`cut_sequences`.
        path: ``teacher-forced``, ``decode`` or ``both``.
        batch_size: sequences at once.
        prefill_length: tokens of each sequence that decoding reads in one pass before it goes token by token.
        storage: of the cache of decoding; in 8 bits it is compared with the other path, and need not agree.
        reference: a model of the same vocabulary, which reads the same sequences whole; each path is compared with it.
        watch: who is told how far it is.

    Raises:
        ValueError: tokens outside the vocabulary, sequences longer than the model reads, a size out of range.
    """
    check(model, token_NT, path, batch_size, prefill_length, storage=storage, reference=reference)
    asserted = model.dtype == torch.float32 and storage.kv_dtype == AUTO.name
    threshold = model.settings.decision_threshold if model.settings else 0.0
    agreement = Agreement(asserted, threshold) if path == BOTH else None
    whole, decoded, start = _Sums(), _Sums(), time.perf_counter()
    for batch_BT in token_NT.split(batch_size):
        token_TB = batch_BT.T.to(model.device)
        beside = None if reference is None else Reference.read(reference, token_TB)
        if path != DECODE:
            whole_scores = whole.timed(score_whole, model, token_TB, beside)
            if path == TEACHER_FORCED and watch.advance is not None:
                watch.advance(token_TB[1:].numel())
        if path != TEACHER_FORCED:
            decoded_scores = decoded.timed(
                score_decode,
                model,
                token_TB,
                beside,
                prefill_length=prefill_length,
                storage=storage,
                advance=watch.advance,
            )
        if agreement is not None:
            agreement.add(whole_scores, decoded_scores)
        if watch.after_batch is not None:
            watch.after_batch(SoFar.of(decoded if path == DECODE else whole, time.perf_counter() - start))
    return Evaluation(
        num_sequences=len(token_NT),
        seq_length=token_NT.shape[1] - 1,
        dtype=str(model.dtype).removeprefix("torch."),
        teacher_forced=None if path == DECODE else whole.result(model),
        decode=None if path == TEACHER_FORCED else decoded.result(model),
        agreement=agreement,
    )


class _Sums:
    """What one path has measured so far."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.loss_N: list[Tensor] = []
        self.entries_S: list[Tensor] = []
        self.blocks_S: list[Tensor] = []
        self.entries_LG: list[Tensor] = []
        self.usages: list[CacheUsage] = []
        self.against_reference = ReferenceSums()

    def timed(
        self, score: Any, model: Decoder, token_TB: Tensor, reference: Reference | None, **options: Any
    ) -> Scores:
        """Score one batch and add it."""
        start = time.perf_counter()
        scores: Scores = score(model, token_TB, reference, **options)
        self.loss_N.append(-scores.log_prob_SB.double().mean(dim=0).cpu())
        self.seconds += time.perf_counter() - start
        self.entries_S.append(scores.entries_S.cpu())
        self.entries_LG.append(scores.entries_LG.cpu())
        if scores.blocks_S is not None:
            self.blocks_S.append(scores.blocks_S.cpu())
        if reference is not None:
            self.against_reference.add(scores)
        if scores.usage is not None:
            self.usages.append(scores.usage)
        return scores

    def result(self, model: Decoder) -> PathResult:
        """The measurement over all batches."""
        loss_N = torch.cat(self.loss_N)
        count, loss = len(loss_N), Estimate.of(loss_N)
        entries_S = torch.stack(self.entries_S).sum(dim=0)
        entries_LG = torch.stack(self.entries_LG).sum(dim=0)
        num_tokens = count * len(entries_S)
        known_S = (entries_S >= 0).nonzero().flatten()
        step = max(1, math.ceil(len(known_S) / CURVE_POINTS))
        # Counted from the end, so that the last position is a point of the curve.
        shown = known_S.flip(0)[::step].flip(0).tolist()
        mean_entries = entries_S[known_S].double().mean().item() / (count * entries_LG.numel())
        usage = CacheUsage.total(self.usages) if self.usages else None
        return PathResult(
            loss=loss.mean,
            standard_error=loss.standard_error,
            seconds=self.seconds,
            compression_ratio=num_tokens * entries_LG.numel() / entries_LG.sum().item(),
            compression_ratio_per_layer_and_kv_head=(num_tokens / entries_LG).tolist(),
            entries_over_tokens=[(position + 1, entries_S[position].item() / count) for position in shown],
            mean_resident_entries=mean_entries,
            mean_resident_ratio=(known_S + 1).double().mean().item() / mean_entries,
            mean_resident_bytes=None if usage is None else self._mean_bytes(usage, known_S),
            cache=usage,
            against_reference=self.against_reference.result(),
        )

    def _mean_bytes(self, usage: CacheUsage, known_S: Tensor) -> float:
        """Of one sequence, over the positions at which the cache was looked at."""
        blocks = torch.stack(self.blocks_S).sum(dim=0)[known_S].double().mean().item()
        return (blocks * usage.block_bytes + usage.num_heads * usage.state_bytes) / usage.num_sequences


def _check_kv_dtype(path: str, kv_dtype: str) -> None:
    find_kv_format(kv_dtype)
    if path == TEACHER_FORCED and kv_dtype != AUTO.name:
        raise ValueError(
            f"kv_dtype={kv_dtype!r}: the path {path!r} has no cache that could be quantised; measure it with "
            f"path={DECODE!r}, or beside it with path={BOTH!r}"
        )


def _check_reference(model: Decoder, reference: Decoder, seq_length: int) -> None:
    ours, theirs = model.config, reference.config
    if ours.vocab_size != theirs.vocab_size:
        raise ValueError(
            f"the reference has a vocabulary of {theirs.vocab_size} tokens, the model one of {ours.vocab_size}: their "
            "distributions cannot be compared; give a reference with the model's tokenizer"
        )
    if not reference.method.has_whole_form:
        raise ValueError(f"the reference is kept by {reference.method.name}, which does not read whole sequences")
    if seq_length > theirs.max_position_embeddings:
        raise ValueError(
            f"seq_length={seq_length}: the reference reads at most {theirs.max_position_embeddings} tokens"
        )


def check(
    model: Decoder,
    token_NT: Tensor,
    path: str,
    batch_size: int,
    prefill_length: int,
    *,
    storage: Storage = DEFAULT_STORAGE,
    reference: Decoder | None = None,
) -> None:
    """Raise what :func:`evaluate` would, which takes the same arguments."""
    _check_kv_dtype(path, storage.kv_dtype)
    if path not in PATHS:
        raise ValueError(f"path={path!r}: must be one of {', '.join(PATHS)}")
    if path != DECODE and not model.method.has_whole_form:
        raise ValueError(f"path={path!r}: {model.method.name} decides token by token, measure it with path={DECODE!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1")
    seq_length = token_NT.shape[1] - 1
    if not 0 <= prefill_length <= seq_length:
        raise ValueError(f"prefill_length={prefill_length}: must be from 0 to the sequence length {seq_length}")
    if seq_length > model.config.max_position_embeddings:
        raise ValueError(
            f"seq_length={seq_length}: the model reads at most {model.config.max_position_embeddings} tokens"
        )
    vocab_size = model.config.vocab_size
    outside = token_NT[(token_NT < 0) | (token_NT >= vocab_size)]
    if len(outside):
        raise ValueError(
            f"the data holds token {int(outside[0])}: the model's vocabulary is 0..{vocab_size - 1}; give data made "
            "with the tokenizer that the model was trained with"
        )
    if reference is not None:
        _check_reference(model, reference, seq_length)

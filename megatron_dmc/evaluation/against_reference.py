"""A model beside a reference on the same tokens: KL, the most likely token, perplexity; over all and by position.

The reference reads whole sequences; the model, whichever path is measured. Standard errors are over sequences, whose
tokens are not independent.

Legend: N sequences, S positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.evaluation.estimate import Estimate, perplexity_of
from megatron_dmc.evaluation.scores import Scores

FIRST_BUCKET = 128
"""Positions of the first bucket; each that follows ends at twice the position where the one before ended."""


class Span(NamedTuple):
    """What was measured over a range of positions."""

    start: int
    end: int
    """The position after the last."""
    kl: Estimate
    """KL(reference || model) per token, nats."""
    max_kl: float
    same_top: Estimate
    """Share of positions where both hold the same token for the most likely one."""
    loss: Estimate
    """Of the model, nats per token."""
    reference_loss: Estimate
    excess_loss: Estimate
    """The model's minus the reference's, sequence by sequence: texts differ far more than the two do."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "start": self.start,
            "end": self.end,
            "mean_kl": self.kl.mean,
            "mean_kl_standard_error": self.kl.standard_error,
            "max_kl": self.max_kl,
            "top1_agreement": self.same_top.mean,
            "top1_agreement_standard_error": self.same_top.standard_error,
            **_perplexity("", self.loss),
            **_perplexity("reference_", self.reference_loss),
            "perplexity_ratio": perplexity_of(self.excess_loss.mean),
            "perplexity_ratio_standard_error": perplexity_of(self.excess_loss.mean) * self.excess_loss.standard_error,
        }


class AgainstReference(NamedTuple):
    """One path of a model beside the reference."""

    overall: Span
    by_position: list[Span]

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**self.overall.to_dict(), "by_position": [span.to_dict() for span in self.by_position]}


class ReferenceSums:
    """Collects the divergence of every token: four numbers each, on the CPU."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, ...]] = []

    def add(self, scores: Scores) -> None:
        """Add a batch that was scored beside a reference."""
        assert scores.divergence is not None
        kl_SB, same_top_SB, reference_SB = scores.divergence
        figures = (kl_SB, same_top_SB.float(), -scores.log_prob_SB, -reference_SB)
        self._parts.append(tuple(figure_SB.T.cpu() for figure_SB in figures))

    def result(self) -> AgainstReference | None:
        """The measurement over all batches; None where none was added."""
        if not self._parts:
            return None
        kl_NS, same_top_NS, loss_NS, reference_NS = (torch.cat(part) for part in zip(*self._parts, strict=True))

        def span(start: int, end: int) -> Span:
            here = slice(start, end)
            values = (same_top_NS, loss_NS, reference_NS, loss_NS - reference_NS)
            means = (Estimate.of(x_NS[:, here].mean(dim=1)) for x_NS in values)
            kl = Estimate.of(kl_NS[:, here].mean(dim=1))
            return Span(start, end, kl, kl_NS[:, here].max().item(), *means)

        length = kl_NS.shape[1]
        return AgainstReference(span(0, length), [span(*ends) for ends in buckets(length)])


def buckets(seq_length: int) -> list[tuple[int, int]]:
    """Ranges of positions that double in size: (0, 128), (128, 256), (256, 512), ...; the last ends with the text."""
    ranges, start, end = [], 0, FIRST_BUCKET
    while start < seq_length:
        ranges.append((start, min(end, seq_length)))
        start, end = end, 2 * end
    return ranges


def _perplexity(prefix: str, loss: Estimate) -> dict[str, float]:
    """Perplexity, and its standard error to first order in that of the loss."""
    perplexity = perplexity_of(loss.mean)
    return {
        f"{prefix}perplexity": perplexity,
        f"{prefix}perplexity_standard_error": perplexity * loss.standard_error,
        f"{prefix}loss": loss.mean,
        f"{prefix}loss_standard_error": loss.standard_error,
    }

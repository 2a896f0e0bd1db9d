"""What a learned method decided, in numbers: one object for pooling, loss, cache and trace.

Legend: S positions, T new tokens, B sequences, G KV heads (1 where a layer decides at once), L positions of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

NoiseSource = Callable[[int], Tensor]
"""Logistic noise, float32 [S, B, heads], for a number of deciding heads."""


class Decisions(NamedTuple):
    """Of shape [S, B, G] for whole sequences, [T, G] for packed new tokens."""

    logits: Tensor
    """float32 decision logits, without noise."""
    taken: Tensor
    """bool: what the logits (with noise, in training) say."""
    hard: Tensor
    """bool: ``taken``, but False where it has no effect: on the first token of a sequence or document in DMC, by it in
    DMS where tokens decide about the one before them."""
    alpha: Tensor
    """``hard`` as numbers, or their relaxation in training, which carries the gradient."""
    own_bias: Tensor
    """log(1 - alpha): what the decision of a position adds to the score of the key that it is about."""
    omega: Tensor | None = None
    """Positive importances, in DMC."""
    relaxed: Tensor | None = None
    """The relaxation of ``taken``; None where decisions are hard."""
    noise: Tensor | None = None
    """Logistic noise that was added to the logits; None where decisions are hard."""

    @property
    def key_bias(self) -> Tensor:
        """Score bias of each key, where the next position decides about it; nothing comes after the last."""
        return torch.cat((self.own_bias[1:], torch.zeros_like(self.own_bias[:1])))

    def fraction(self, position_L: Tensor | None = None) -> Tensor:
        """The statistic of the compression loss ([DMC] eq. 11): share of positions, all or those given, [B, G].

        The value is that of the hard decisions, the gradient that of the relaxed ones (straight through). Every
        position counts with the decision its logit takes, the first of a sequence too, where that may have no effect:
        so does the authors' code of either method.
        """
        hard = self.taken.to(self.logits.dtype)
        if position_L is not None:
            hard = hard[position_L]
        if self.relaxed is None:
            return hard.mean(0)
        relaxed = self.relaxed if position_L is None else self.relaxed[position_L]
        relaxed = relaxed.mean(0)
        return hard.mean(0) + (relaxed - relaxed.detach())

    def of_heads(self, num_kv_heads: int) -> Decisions:
        """The same for every head where a layer decides at once."""
        if self.logits.shape[-1] == num_kv_heads:
            return self
        return Decisions(*(None if x is None else x.expand(*x.shape[:-1], num_kv_heads) for x in self))  # type: ignore[arg-type]

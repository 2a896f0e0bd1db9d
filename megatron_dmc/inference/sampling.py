"""From logits to the next token: greedy, or from the nucleus of the softmax.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued.

    Args:
        max_new_tokens: at most so many tokens, >= 1.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1].
        seed: of the request's own random numbers; the same seed and prompt give the same text in any batch.
        end_tokens: each of them ends a text and is not part of it.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    end_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}: must be >= 0 (0 = most likely token)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be in (0, 1] (1 = all tokens)")


def sample(logits_BV: Tensor, temperature_B: Tensor, top_p_B: Tensor, uniform_B: Tensor) -> Tensor:
    """The next token of each sequence, int64 [B].

    Args:
        logits_BV: float32.
        temperature_B, top_p_B: see :class:`SamplingParams`.
        uniform_B: one number in [0, 1) per sequence: where in the cumulative distribution the token is taken.
    """
    greedy_B = logits_BV.argmax(dim=-1)
    if not temperature_B.any():
        return greedy_B
    scaled_BV = logits_BV / torch.where(temperature_B > 0, temperature_B, 1.0).unsqueeze(-1)
    probability_BV, token_BV = scaled_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    cumulative_BV = probability_BV.cumsum(dim=-1, dtype=torch.float64)
    # A token belongs to the nucleus if those before it do not reach top_p: the first always does.
    num_kept_B1 = ((cumulative_BV - probability_BV) < top_p_B.unsqueeze(-1)).sum(dim=-1, keepdim=True)
    kept_mass_B1 = cumulative_BV.gather(1, num_kept_B1 - 1)
    rank_B1 = torch.searchsorted(cumulative_BV, uniform_B.double().unsqueeze(-1) * kept_mass_B1, right=True)
    sampled_B = token_BV.gather(1, rank_B1.minimum(num_kept_B1 - 1)).squeeze(-1)
    return torch.where(temperature_B > 0, sampled_B, greedy_B)

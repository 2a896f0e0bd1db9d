"""From logits to the next token, with the definitions and the order of transformers' ``generate``.

Penalty for repetition, temperature, top-k, top-p, min-p: each works on what the ones before it left. Requests of one
batch may ask for different things.

Legend: B batch, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NUCLEUS_TOKENS = 256
"""Most likely tokens among which a nucleus is looked for before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class SamplingParams:
    """How a text is continued.

    Args:
        max_new_tokens: at most so many tokens, >= 1.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample among so many most likely tokens; 0 takes all.
        top_p: sample among the most likely tokens that together reach this probability, in (0, 1].
        min_p: sample among the tokens that have this share of the highest probability, in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of the tokens of prompt and text, > 0;
            1 changes nothing.
        seed: of the request's own random numbers; the same seed and prompt give the same text in any batch.
        end_tokens: each of them ends a text and is not part of it.
        stop: a text ends before the first of these strings.
        logprobs: keep the log-probability of every new token and those of so many most likely ones; None keeps none.
        prompt_logprobs: keep those of the prompt too.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    end_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        finite = math.isfinite
        for name, holds, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", finite(self.temperature) and self.temperature >= 0, ">= 0 (0 = most likely token)"),
            ("top_k", self.top_k >= 0, ">= 0 (0 = all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1] (1 = all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1] (0 = all tokens)"),
            ("repetition_penalty", finite(self.repetition_penalty) and self.repetition_penalty > 0, "> 0 (1 = none)"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("logprobs", self.logprobs is None or self.logprobs >= 0, ">= 0 (0 = of the chosen token alone)"),
            ("prompt_logprobs", not self.prompt_logprobs or self.logprobs is not None, "false without logprobs"),
        ):
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)}: must be {allowed}")


def penalize(logits_BV: Tensor, penalty_B: Tensor, seen_BV: Tensor) -> Tensor:
    """Logits of the tokens ``seen_BV`` (bool) moved down by a penalty above 1, up by one below."""
    penalty_B1 = penalty_B.unsqueeze(-1)
    moved_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, moved_BV, logits_BV)


def probabilities(logits_BV: Tensor, samplings: Sequence[SamplingParams]) -> Tensor:
    """What sampling draws from, float32 [B, V]; every temperature must be above 0."""
    temperature_B1 = _column("temperature", samplings, logits_BV).clamp(min=torch.finfo(logits_BV.dtype).tiny)
    # Measured from the highest one, no logit overflows at a low temperature.
    scores_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / temperature_B1
    for name, leaves, unset in (("top_k", _top_k, 0), ("top_p", _top_p, 1.0), ("min_p", _min_p, 0.0)):
        scores_BV = _where_asked(scores_BV, samplings, name, unset, leaves)
    return scores_BV.softmax(dim=-1)


def draw(probability_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The token at ``uniform_B`` (float64 in [0, 1)) of each cumulative distribution, int64 [B].

    Tokens stay in the order of the vocabulary: rounding that turns two nearly equal ones moves a border by as little.
    """
    cumulative_BV = probability_BV.cumsum(dim=-1, dtype=torch.float64)
    total_B1 = cumulative_BV[:, -1:].contiguous()
    token_B1 = torch.searchsorted(cumulative_BV, uniform_B.unsqueeze(-1) * total_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BV, total_B1)
    return token_B1.minimum(last_B1).squeeze(-1)


def sample(logits_BV: Tensor, samplings: Sequence[SamplingParams], uniforms: Sequence[float]) -> Tensor:
    """The next token of each sequence, int64 [B].

    Args:
        logits_BV: float32, penalties applied.
        samplings: of each sequence.
        uniforms: one number in [0, 1) per sequence: where in the cumulative distribution the token is taken.
    """
    token_B = logits_BV.argmax(dim=-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature]
    if drawn:
        rows = torch.tensor(drawn, device=logits_BV.device)
        uniform_B = torch.tensor([uniforms[row] for row in drawn], dtype=torch.float64, device=logits_BV.device)
        token_B[rows] = draw(probabilities(logits_BV[rows], [samplings[row] for row in drawn]), uniform_B)
    return token_B


def _where_asked(
    scores_BV: Tensor,
    samplings: Sequence[SamplingParams],
    name: str,
    unset: float,
    leaves: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Scores with -inf for what ``leaves(scores, setting)`` (bool) does not leave, in the rows that set ``name``."""
    asked = [row for row, sampling in enumerate(samplings) if getattr(sampling, name) != unset]
    if not asked:
        return scores_BV
    rows = torch.tensor(asked, device=scores_BV.device)
    some_BV = scores_BV[rows]
    left_BV = leaves(some_BV, _column(name, [samplings[row] for row in asked], scores_BV))
    return scores_BV.index_copy(0, rows, some_BV.masked_fill(~left_BV, -torch.inf))


def _top_k(scores_BV: Tensor, k_B1: Tensor) -> Tensor:
    """Tokens no less likely than the k-th: more than k where several are equal to it."""
    k_B1 = k_B1.clamp(max=scores_BV.shape[-1]).long()
    best_BK = scores_BV.topk(int(k_B1.max()), dim=-1).values
    return scores_BV >= best_BK.gather(1, k_B1 - 1)


def _top_p(scores_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """Tokens before which more likely ones do not reach top_p, and those that are equal to the last of them."""
    probability_BV = scores_BV.softmax(dim=-1)
    best_BK = probability_BV.topk(min(NUCLEUS_TOKENS, scores_BV.shape[-1]), dim=-1).values
    border_B1 = _nucleus_border(best_BK, top_p_B1)
    is_longer_B = best_BK.sum(dim=-1) < top_p_B1.squeeze(-1)
    if is_longer_B.any():
        sorted_BV = probability_BV[is_longer_B].sort(dim=-1, descending=True).values
        border_B1[is_longer_B] = _nucleus_border(sorted_BV, top_p_B1[is_longer_B])
    return probability_BV >= border_B1


def _nucleus_border(sorted_BK: Tensor, top_p_B1: Tensor) -> Tensor:
    """The least probability in the nucleus [B, 1], from the highest ones in falling order."""
    before_BK = sorted_BK.cumsum(dim=-1, dtype=torch.float64) - sorted_BK
    num_kept_B1 = (before_BK < top_p_B1).sum(dim=-1, keepdim=True)
    return sorted_BK.gather(1, num_kept_B1 - 1)


def _min_p(scores_BV: Tensor, min_p_B1: Tensor) -> Tensor:
    probability_BV = scores_BV.softmax(dim=-1)
    return probability_BV >= min_p_B1 * probability_BV.amax(dim=-1, keepdim=True)


def _column(name: str, samplings: Sequence[SamplingParams], like: Tensor) -> Tensor:
    """A setting as [B, 1] in the type and place of ``like``."""
    return torch.tensor([[getattr(sampling, name)] for sampling in samplings], dtype=like.dtype, device=like.device)

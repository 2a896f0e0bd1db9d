"""The next tokens of requests: their penalties, their random numbers, and the log-probabilities that they ask for.

Legend: B requests of a batch, R rows of the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.inference.logprobs import TokenLogprob, token_logprobs
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import penalize, sample


class Sampler:
    """Takes one token for each of some requests, which have rows of the cache."""

    def __init__(self) -> None:
        self._seen = _SeenTokens()

    def next_tokens(self, requests: Sequence[Request], logits_BV: Tensor) -> list[int]:
        """One token of each, from float32 logits; draws a number of every request."""
        samplings = [request.sampling for request in requests]
        scores_BV = self._penalized(requests, logits_BV)
        return sample(scores_BV, samplings, [request.draw() for request in requests]).tolist()

    def logprobs(
        self, requests: Sequence[Request], logits_BV: Tensor, tokens: Sequence[int]
    ) -> list[TokenLogprob | None]:
        """Of the tokens that were taken; None where a request asks for none."""
        found: list[TokenLogprob | None] = [None] * len(requests)
        asked = {place: k for place, request in enumerate(requests) if (k := request.sampling.logprobs) is not None}
        if not asked:
            return found
        places = list(asked)
        stated = token_logprobs(logits_BV[places], [tokens[place] for place in places], max(asked.values()))
        for place, logprob in zip(places, stated, strict=True):
            found[place] = logprob._replace(top=logprob.top[: asked[place]])
        return found

    def _penalized(self, requests: Sequence[Request], logits_BV: Tensor) -> Tensor:
        asked = [place for place, request in enumerate(requests) if request.sampling.repetition_penalty != 1]
        if not asked:
            return logits_BV
        places = torch.tensor(asked, device=logits_BV.device)
        some = [requests[place] for place in asked]
        penalty_B = torch.tensor([request.sampling.repetition_penalty for request in some], device=logits_BV.device)
        some_BV = logits_BV[places]
        return logits_BV.index_copy(0, places, penalize(some_BV, penalty_B, self._seen.of(some, some_BV)))


class _SeenTokens:
    """Which tokens stand in the text of each row: a table that is brought up to date when it is asked."""

    def __init__(self) -> None:
        self._seen_RV: Tensor | None = None
        self._counted: dict[int, tuple[Request, int]] = {}
        """Row -> whose text it is, and how many of its tokens are in the table."""

    def of(self, requests: Sequence[Request], like_BV: Tensor) -> Tensor:
        """bool [B, V]."""
        rows = [request.row for request in requests if request.row is not None]
        seen_RV = self._table(1 + max(rows), like_BV)
        new_rows, new_tokens = [], []
        for row, request in zip(rows, requests, strict=True):
            owner, counted = self._counted.get(row, (None, 0))
            if owner is not request:
                seen_RV[row], counted = False, 0
            tokens = request.tokens(counted)
            new_rows += [row] * len(tokens)
            new_tokens += tokens
            self._counted[row] = (request, counted + len(tokens))
        seen_RV[torch.tensor(new_rows, device=seen_RV.device), torch.tensor(new_tokens, device=seen_RV.device)] = True
        return seen_RV[torch.tensor(rows, device=seen_RV.device)]

    def _table(self, num_rows: int, like_BV: Tensor) -> Tensor:
        """The table, with at least so many rows."""
        missing = num_rows - (0 if self._seen_RV is None else len(self._seen_RV))
        if missing > 0:
            more = torch.zeros(missing, like_BV.shape[-1], dtype=torch.bool, device=like_BV.device)
            self._seen_RV = more if self._seen_RV is None else torch.cat([self._seen_RV, more])
        assert self._seen_RV is not None
        return self._seen_RV

"""Log-probabilities of given tokens, as the model states them: float32, before penalties, temperature and cuts.

Legend: T tokens, V vocabulary, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

LOGITS_AT_ONCE = 1 << 24
"""Logits that exist at one time where many positions need theirs: 64 MiB in float32."""


class TokenLogprob(NamedTuple):
    """A token of a text, and what else might have stood there."""

    token: int
    logprob: float
    top: list[tuple[int, float]]
    """The most likely tokens and their log-probabilities, most likely first."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"token": self.token, "logprob": self.logprob, "top": [list(pair) for pair in self.top]}


def token_logprobs(logits_TV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """Log-probabilities of ``tokens`` (T of them) and of the ``num_top`` most likely ones in their places."""
    logprob_TV = logits_TV.float().log_softmax(dim=-1)
    token_T1 = torch.tensor(tokens, dtype=torch.int64, device=logits_TV.device).unsqueeze(-1)
    chosen_T = logprob_TV.gather(1, token_T1).squeeze(-1).tolist()
    values_TK, top_TK = logprob_TV.topk(min(num_top, logits_TV.shape[-1]), dim=-1)
    tops = zip(top_TK.tolist(), values_TK.tolist(), strict=True)
    return [
        TokenLogprob(token, logprob, list(zip(*top, strict=True)))
        for token, logprob, top in zip(tokens, chosen_T, tops, strict=True)
    ]

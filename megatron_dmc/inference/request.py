"""A text that is being continued: what was asked, how far it is, and why it ended."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.sampling import SamplingParams


@dataclass
class Request:
    """One prompt and its continuation.

    Args:
        prompt: token ids, at least one.
        sampling: how to continue it.
    """

    prompt: list[int]
    sampling: SamplingParams
    output: list[int] = field(default_factory=list)
    """Tokens so far, without the one that ended the text."""
    finish_reason: str | None = None
    """``eod`` or ``length``; None while the request waits or runs."""
    usage: CacheUsage | None = None
    """What the cache held for it at its end."""
    row: int | None = None
    """Row of the cache while it runs."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.sampling.seed)

    @property
    def newest_token(self) -> int:
        """The token that the model reads next."""
        return self.output[-1] if self.output else self.prompt[-1]

    @property
    def progress(self) -> int:
        """Tokens that need no more work, of ``max_new_tokens``."""
        return self.sampling.max_new_tokens if self.finish_reason else len(self.output)

    def draw(self) -> float:
        """The request's next random number, in [0, 1)."""
        return self._random.random()

    def receive(self, token: int) -> None:
        """Take the next token, which may be the last."""
        if token in self.sampling.end_tokens:
            self.finish_reason = "eod"
            return
        self.output.append(token)
        if len(self.output) == self.sampling.max_new_tokens:
            self.finish_reason = "length"

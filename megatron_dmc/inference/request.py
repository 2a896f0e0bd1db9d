"""A text that is being continued: what was asked, how far it is, and why it ended."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.sampling import SamplingParams

FinishReason = Literal["eod", "length", "aborted", "error"]


@dataclass(eq=False)
class Request:
    """One prompt and its continuation.

    Args:
        prompt: token ids, at least one.
        sampling: how to continue it.
        on_token: called with every new token; what it raises ends this request alone.
    """

    prompt: list[int]
    sampling: SamplingParams
    on_token: Callable[[int], None] | None = None
    output: list[int] = field(default_factory=list)
    """Tokens so far, without the one that ended the text."""
    finish_reason: FinishReason | None = None
    """None while the request waits or runs."""
    error: str = ""
    """What went wrong where ``finish_reason`` is ``error``."""
    usage: CacheUsage | None = None
    """What the cache held for it at its end."""
    row: int | None = None
    """Row of the cache while it runs; None while it waits, for the first time or after it lost its memory."""
    num_read: int = 0
    """Tokens of prompt and output that the cache holds."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.sampling.seed)

    @property
    def unread(self) -> list[int]:
        """Tokens that the model reads next: the prompt or the rest of it, later the newest token."""
        if self.num_read < len(self.prompt):
            return self.prompt[self.num_read :] + self.output
        return self.output[self.num_read - len(self.prompt) :]

    @property
    def num_unread(self) -> int:
        """How many they are."""
        return len(self.prompt) + len(self.output) - self.num_read

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
        if self.on_token is not None:
            self.on_token(token)

    def fail(self, error: str) -> None:
        """End without a result."""
        self.finish_reason, self.error = "error", error

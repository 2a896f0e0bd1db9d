"""What requests will need, learned from those before them: admission goes by what is expected to survive. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from megatron_dmc.inference.request import Request

MEMORY = 0.95
"""Weight of what was known beside one more observation: about the last twenty count."""


class Share:
    """A part of a whole that is measured again and again; all of it as long as nothing is known."""

    def __init__(self) -> None:
        self._part = self._whole = 0.0

    @property
    def value(self) -> float:
        """In [0, 1]."""
        return min(1.0, self._part / self._whole) if self._whole else 1.0

    def observe(self, part: float, whole: float) -> None:
        """Let ``part`` of ``whole`` count."""
        self._part, self._whole = MEMORY * self._part + part, MEMORY * self._whole + whole


class ExpectedText(NamedTuple):
    """What a text is expected to need from now on."""

    num_steps: int
    """Until its end, at least 1."""
    at_once: int
    """Blocks when its prompt was read."""
    later: int
    """Blocks beside, step by step until its end."""
    held: int
    """Blocks that it holds when its prompt was read, and that are free after its end, with the later ones."""


def most_blocks(texts: Iterable[ExpectedText]) -> float:
    """Blocks that texts need beside those that they hold, at the time when they need most.

    Those that end give their blocks to the others: there are as many candidates for that time as texts, each the step
    before one ends.
    """
    longest_first = sorted(texts, reverse=True)
    at_once = sum(text.at_once for text in longest_first)
    given_back = sum(text.held for text in longest_first)
    most, per_step = float(at_once), 0.0
    for text in longest_first:
        per_step += text.later / text.num_steps
        given_back -= text.held
        most = max(most, at_once + per_step * text.num_steps - given_back)
    return most


class Expectation:
    """Blocks that requests will hold. At first the worst case: nothing is merged, and every text gets its full length.

    Args:
        num_heads: head caches of a sequence: layers times KV heads.
        block_size: entries per block.
        most_entries: how many a head keeps at most of so many tokens; None: all of them.
        learns: whether what others needed counts. Where a request cannot be read again, only the worst is safe.
        shares: whether samples of a prompt share its blocks.

    Attributes:
        num_changes: how often it changed; as long as it did not, it answers the same.
    """

    def __init__(
        self,
        num_heads: int,
        block_size: int,
        *,
        most_entries: Callable[[int], float] | None = None,
        learns: bool = True,
        shares: bool = True,
    ) -> None:
        self.num_heads = num_heads
        self.block_size = block_size
        self._most_entries = most_entries
        self._learns, self._shares = learns, shares
        self._held, self._written = Share(), Share()
        self.num_changes = 0

    def observe_held(self, blocks: int, num_tokens: int) -> None:
        """``num_tokens`` of a sequence were found to need so many blocks over all heads."""
        if self._learns:
            self.num_changes += 1
            self._held.observe(blocks, self._uncompressed(num_tokens))

    def observe_written(self, request: Request) -> None:
        """A text reached its end by itself."""
        if self._learns:
            self.num_changes += 1
            self._written.observe(len(request.output), request.sampling.max_new_tokens)

    def forget(self) -> None:
        """Expect the worst again: it happened."""
        self.num_changes += 1
        self._held, self._written = Share(), Share()

    def blocks(self, num_tokens: int) -> int:
        """Blocks of a sequence of so many tokens; every head has at least one."""
        return max(self.num_heads, math.ceil(self._held.value * self._uncompressed(num_tokens))) if num_tokens else 0

    def text(self, request: Request) -> ExpectedText:
        """What a request will need beside the blocks of the tokens that it has read."""
        num_new = max(len(request.output) + 1, math.ceil(self._written.value * request.sampling.max_new_tokens))
        now = self.blocks(request.num_read)
        read = self.blocks(len(request.prompt) + len(request.output))
        end = self.blocks(len(request.prompt) + num_new)
        if not self._learns:
            read = end
        return ExpectedText(num_new - len(request.output), max(0, read - now), max(0, end - read), max(read, now))

    def sample(self, request: Request) -> ExpectedText:
        """The same for one more sample of a prompt, which may share all blocks of it but the last of every head."""
        text = self.text(request)
        if not self._shares:
            return text
        return text._replace(at_once=self.num_heads, held=self.num_heads)

    def _uncompressed(self, num_tokens: int) -> int:
        num_entries = num_tokens if self._most_entries is None else self._most_entries(num_tokens)
        return self.num_heads * math.ceil(num_entries / self.block_size)

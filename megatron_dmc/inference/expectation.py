"""What requests will need, learned from those before them: admission goes by what is expected to survive. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable

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


class Expectation:
    """Blocks that requests will hold. At first the worst case: nothing is merged, and every text gets its full length.

    Args:
        num_heads: head caches of a sequence: layers times KV heads.
        block_size: entries per block.
        most_entries: how many a head keeps at most of so many tokens; None: all of them.
        learns: whether what others needed counts. Where a request cannot be read again, only the worst is safe.
        shares: whether samples of a prompt share its blocks.
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

    def observe_held(self, blocks: int, num_tokens: int) -> None:
        """``num_tokens`` of a sequence were found to need so many blocks over all heads."""
        if self._learns:
            self._held.observe(blocks, self._uncompressed(num_tokens))

    def observe_written(self, request: Request) -> None:
        """A text reached its end by itself."""
        if self._learns:
            self._written.observe(len(request.output), request.sampling.max_new_tokens)

    def forget(self) -> None:
        """Expect the worst again: it happened."""
        self._held, self._written = Share(), Share()

    def blocks(self, num_tokens: int) -> int:
        """Blocks of a sequence of so many tokens; every head has at least one."""
        return max(self.num_heads, math.ceil(self._held.value * self._uncompressed(num_tokens))) if num_tokens else 0

    def growth(self, request: Request) -> int:
        """Blocks that a request will need beside those of the tokens that it has read."""
        at_end = self.blocks(len(request.prompt) + self._new_tokens(request))
        return max(0, at_end - self.blocks(request.num_read))

    def growth_of_sample(self, request: Request) -> int:
        """The same for one more sample of its prompt, which may share all blocks of it but the last of every head."""
        shared = self._own_prompt(request) - self.num_heads if self._shares else 0
        return self.growth(request) - shared

    def _own_prompt(self, request: Request) -> int:
        return self.blocks(len(request.prompt)) - self.blocks(request.num_read)

    def _new_tokens(self, request: Request) -> int:
        return max(len(request.output), math.ceil(self._written.value * request.sampling.max_new_tokens))

    def _uncompressed(self, num_tokens: int) -> int:
        num_entries = num_tokens if self._most_entries is None else self._most_entries(num_tokens)
        return self.num_heads * math.ceil(num_entries / self.block_size)

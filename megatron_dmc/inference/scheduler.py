"""Who reads next: prompts of waiting requests while there is room, else one token of all running ones. No torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dmc.inference.request import Request

DEFAULT_PREFILL_TOKENS = 8192
"""Tokens of prompts that are read in one pass; a longer prompt is read in parts."""


@dataclass(frozen=True)
class Batch:
    """Requests that the model reads together.

    Attributes:
        requests: in the order of their tokens.
        counts: how many of its unread tokens each reads.
    """

    requests: list[Request]
    counts: list[int]

    @property
    def reads_all(self) -> bool:
        """Whether every request has nothing left to read after it."""
        return all(count == request.num_unread for request, count in zip(self.requests, self.counts, strict=True))


class Scheduler:
    """Requests in the order in which they came; those that run are in the cache.

    Args:
        prefill_tokens: tokens of prompts per pass, at least 1.
        reads_parts: whether a prompt longer than that is read in parts, or whole all the same.
    """

    def __init__(self, prefill_tokens: int = DEFAULT_PREFILL_TOKENS, *, reads_parts: bool = True) -> None:
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens={prefill_tokens}: must be at least 1")
        self.prefill_tokens = prefill_tokens
        self.reads_parts = reads_parts
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._is_full = False

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, requests: Iterable[Request]) -> None:
        """Let requests wait for their turn."""
        self.waiting.extend(requests)

    def next(self, num_free_rows: int) -> Batch:
        """The next pass: a part of one long prompt, as many whole prompts as fit, or the running requests.

        Admitted requests run from now on; the caller gives them rows, or :meth:`give_back`.
        """
        reading = [request for request in self.running if request.num_unread > 1]
        admitted = reading or self._admit(num_free_rows)
        if not admitted:
            return Batch(list(self.running), [1] * len(self.running))
        counts = [request.num_unread for request in admitted]
        return Batch(admitted, [min(count, self.prefill_tokens) for count in counts] if self.reads_parts else counts)

    def give_back(self, requests: Iterable[Request]) -> None:
        """Let running requests that have no memory wait again, before all others and in their order.

        Nobody is admitted before another one leaves: read again at once, they would lose their memory again.
        """
        requests = list(requests)
        self._is_full = True
        self.running = [request for request in self.running if request not in requests]
        for request in reversed(requests):
            request.num_read = 0
            self.waiting.appendleft(request)

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it stands."""
        self._is_full = False
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def _admit(self, num_free_rows: int) -> list[Request]:
        admitted: list[Request] = []
        if self._is_full and self.running:
            return admitted
        room = self.prefill_tokens
        while self.waiting and len(admitted) < num_free_rows:
            room -= self.waiting[0].num_unread
            if admitted and room < 0:
                break
            admitted.append(self.waiting.popleft())
        self.running += admitted
        return admitted

"""Who reads next: prompts of waiting requests while there is room, in turns with one token of all running texts.

No torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_dmc.inference.expectation import Expectation, most_blocks
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

    @property
    def decodes(self) -> bool:
        """Whether every request reads one token."""
        return all(count == 1 for count in self.counts)


class Scheduler:
    """Requests in the order in which they came; those that run are in the cache.

    A request is admitted when the free blocks cover what it and the running ones are expected to need, or when it is
    alone. Nobody overtakes the first that waits, so each gets its turn. Samples of a prompt wait until it was read.

    Args:
        expectation: what requests need.
        prefill_tokens: tokens of prompts per pass, at least 1.
        reads_parts: whether a prompt longer than that is read in parts, or whole all the same.

    Attributes:
        is_short: whether the last call of :meth:`next` admitted nobody because rows or blocks were missing.
    """

    def __init__(
        self,
        expectation: Expectation,
        prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        *,
        reads_parts: bool = True,
    ) -> None:
        if prefill_tokens < 1:
            raise ValueError(f"prefill_tokens={prefill_tokens}: must be at least 1")
        self.prefill_tokens = prefill_tokens
        self.reads_parts = reads_parts
        self.expectation = expectation
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.is_short = False
        self._samples: dict[Request, list[Request]] = {}
        """Source -> waiting samples of its prompt, until it was read."""
        self._is_full = False
        self._read_prompts = False
        """Whether the last batch did: then the running texts have their turn."""
        self._refused_at: tuple[int, int, int] | None = None
        """Free rows and blocks, and the age of the expectation, when the first that waits found no room."""

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    def add(self, requests: Iterable[Request]) -> None:
        """Let requests wait for their turn; samples come with the request whose prompt they share."""
        for request in requests:
            self.waiting.append(request)
            if request.source is not None:
                self._samples.setdefault(request.source, []).append(request)

    def next(self, num_free_rows: int, num_free_blocks: int) -> Batch:
        """The next pass: a part of one long prompt, as many whole prompts as fit, or the running texts.

        Prompts and texts take turns, so that no text waits for longer than one pass over prompts. Admitted requests
        run from now on; the caller gives them memory, or :meth:`give_back`.

        Args:
            num_free_rows: requests that the cache can take beside those that it holds.
            num_free_blocks: of the cache; of no account while nobody waits.
        """
        self.is_short = False
        reading = [request for request in self.running if request.num_unread > 1]
        decoding = [request for request in self.running if request.num_unread == 1]
        takes_turn = self._read_prompts and decoding
        admitted = [] if takes_turn else reading or self._admit(num_free_rows, num_free_blocks)
        self._read_prompts = bool(admitted)
        if not admitted:
            return Batch(decoding, [1] * len(decoding))
        counts = [request.num_unread for request in admitted]
        return Batch(admitted, [min(count, self.prefill_tokens) for count in counts] if self.reads_parts else counts)

    def take_samples(self, source: Request) -> list[Request]:
        """The waiting samples of a prompt that was read: they :meth:`start`, or wait like others from now on."""
        return self._samples.pop(source, [])

    def start(self, samples: Sequence[Request], source: Request) -> None:
        """Let waiting samples that got memory run beside their source."""
        for sample in samples:
            self.waiting.remove(sample)
        place = self.running.index(source) + 1
        self.running[place:place] = samples

    def give_back(self, requests: Iterable[Request]) -> None:
        """Let running requests that have no memory wait again, before all others and in their order.

        Nobody is admitted before another one leaves, but one that is alone: read again at once and together, they
        would lose their memory again.
        """
        requests = list(requests)
        self._is_full = True
        self.running = [request for request in self.running if request not in requests]
        self.waiting.extendleft(reversed(requests))

    def remove(self, request: Request) -> None:
        """Forget a request, wherever it stands."""
        self._is_full, self._refused_at = False, None
        self._samples.pop(request, None)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            if request.source in self._samples:
                self._samples[request.source].remove(request)

    def _admit(self, num_free_rows: int, num_free_blocks: int) -> list[Request]:
        if not self.waiting or (
            self.running and (self._is_full or self._stays_refused(num_free_rows, num_free_blocks))
        ):
            return []
        room = _Room(self.expectation, self.running, num_free_rows, num_free_blocks)
        admitted: list[Request] = []
        held_back: list[Request] = []
        tokens = self.prefill_tokens
        while self.waiting:
            first = self.waiting[0]
            if first.source in self._samples:
                held_back.append(self.waiting.popleft())
                continue
            is_first = not admitted
            if not room.takes(first, self._samples.get(first, ()), is_alone=is_first and not self.running):
                if is_first:
                    self.is_short = True
                    self._refused_at = (num_free_rows, num_free_blocks, self.expectation.num_changes)
                break
            if not is_first and (self._is_full or tokens < first.num_unread):
                break
            tokens -= first.num_unread
            admitted.append(self.waiting.popleft())
        self.waiting.extendleft(reversed(held_back))
        self.running += admitted
        return admitted

    def _stays_refused(self, num_free_rows: int, num_free_blocks: int) -> bool:
        """Whether nothing has changed for the better since the first that waits found no room."""
        if self._refused_at is None:
            return False
        rows, blocks, age = self._refused_at
        return num_free_rows <= rows and num_free_blocks <= blocks and age == self.expectation.num_changes


class _Room:
    """Rows and blocks for requests beside those that run."""

    def __init__(
        self, expectation: Expectation, running: Sequence[Request], num_free_rows: int, num_free_blocks: int
    ) -> None:
        self._expectation = expectation
        self._rows = num_free_rows
        # What a text needs varies: one block of every head stays free.
        self._blocks = num_free_blocks - expectation.num_heads
        self._texts = [expectation.text(request) for request in running]

    def takes(self, request: Request, samples: Sequence[Request], *, is_alone: bool) -> bool:
        """Whether a request and the samples of its prompt find room, which they take; one that is alone must try."""
        rows = (request.row is None) + len(samples)
        if rows > self._rows and not (is_alone and self._rows >= (request.row is None)):
            return False
        texts = [*self._texts, self._expectation.text(request), *map(self._expectation.sample, samples)]
        if most_blocks(texts) > self._blocks and not is_alone:
            return False
        self._rows -= rows
        self._texts = texts
        return True

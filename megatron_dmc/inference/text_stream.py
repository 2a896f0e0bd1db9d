"""The text of a continuation while its tokens come: whole characters, and never what a stop string takes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_dmc.data.tokenizer.incremental import IncrementalDecoder

Decode = Callable[[Sequence[int]], str]
"""Ids to text, with U+FFFD for bytes that are no character."""


class TextStream:
    """Gives out text that is final; what may become a stop string is held back.

    A text ends before the first stop string in it. A stop string may span tokens, or end within one.

    Args:
        decode: of the tokenizer.
        prompt: ids that come before; their text is not given out, and no stop string begins in it.
        stop: strings that end the text.

    Attributes:
        stopped: whether a stop string came.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decoder = IncrementalDecoder(decode, prompt)
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that became final with a token; empty once :attr:`stopped`."""
        return self._give(self._decoder.add([token]))

    def finish(self) -> str:
        """The rest of a text that ends without a stop string; nothing after one that does."""
        return self._give(self._decoder.finish()) + self._release()

    def _give(self, piece: str) -> str:
        if self.stopped:
            return ""
        pending = self._held + piece
        found = [place for stop in self._stop if (place := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return pending[: min(found)]
        border = len(pending) - max((_overlap(pending, stop) for stop in self._stop), default=0)
        self._held = pending[border:]
        return pending[:border]

    def _release(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` begins; fewer than all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)

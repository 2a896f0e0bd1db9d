"""Text while it is generated: the continuation as it stands in the whole text, never a part of a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
MAX_HELD_TOKENS = 4
"""A character has at most four bytes: what is no character after as many tokens does not become one."""


class IncrementalDecoder:
    """Turns a growing sequence of ids into text, piece by piece.

    Decoding tokens alone loses the space before a word and cuts characters whose bytes are several tokens. So each
    piece is decoded together with the tokens before it, and what may be the begin of a character is held back.

    Args:
        decode: ids to text, with U+FFFD for bytes that are no character.
        prompt: ids that come before, of whole characters; their text is not given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt)
        self._context = 0
        """Where the tokens begin that the next ones are decoded with."""
        self._given = len(self._ids)
        """Where the tokens begin whose text was not given out."""
        self._held = 0
        """Tokens since a character was begun."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete; empty while a character is not whole. Any cut into calls gives the same."""
        return "".join(map(self._add, ids))

    def finish(self) -> str:
        """What is still held back, with U+FFFD for bytes that never became a character."""
        text = self._pending()
        self._context, self._given, self._held = self._given, len(self._ids), 0
        return text

    def _add(self, number: int) -> str:
        self._ids.append(number)
        text = self._pending()
        self._held = self._held + 1 if text.endswith(REPLACEMENT) else 0
        if not text or 0 < self._held < MAX_HELD_TOKENS:
            return ""
        self._context, self._given, self._held = self._given, len(self._ids), 0
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._context : self._given])
        return self._decode(self._ids[self._context :])[len(known) :]


def continuation(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], output: Sequence[int]) -> str:
    """The text of ``output`` as it stands behind ``prompt``."""
    decoder = IncrementalDecoder(decode, prompt)
    return decoder.add(output) + decoder.finish()

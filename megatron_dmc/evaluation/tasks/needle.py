"""Needle in a haystack: the number that belongs to a key, among sentences or among other keys.

Source: RULER, arXiv 2404.06654, section 3.1 (its ``niah_single`` and, where every line is a key, ``niah_multikey``).
Sentences and wording are ours: scores are not RULER's.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from megatron_dmc.evaluation.tasks.base import Draft, Task, Units, hide
from megatron_dmc.evaluation.tasks.words import key, number, sentence

DIGITS = 7


def needle(name: str, value: str) -> str:
    """The line to be found."""
    return f"The special number of {name} is {value}."


class Needle(Task):
    """One key among sentences that say nothing."""

    name = "niah"
    max_new_tokens = 24
    has_depth = True

    def draft(self, random: Random, depth: float) -> Draft:
        """See :meth:`Task.draft`."""
        name, value = key(random), number(random, DIGITS)
        lines = Units(random, self.line_other_than(name))
        return Draft(
            introduction="Some special numbers are hidden in the following text. Remember them: you are asked for one.",
            haystack=lambda count: "\n".join(hide(lines.first(count), [(depth, needle(name, value))])),
            question=f"What is the special number of {name} in the text?",
            answer_prefix=f"The special number of {name} is",
            answers=(value,),
        )

    def line_other_than(self, name: str) -> Callable[[Random], str]:
        """What makes the lines of the haystack, none of them about ``name``."""
        return sentence


class MultiKeyNeedle(Needle):
    """One key among other keys."""

    name = "niah_multikey"

    def line_other_than(self, name: str) -> Callable[[Random], str]:
        """See :meth:`Needle.line_other_than`."""

        def line(random: Random) -> str:
            other = key(random)
            while other == name:
                other = key(random)
            return needle(other, number(random, DIGITS))

        return line

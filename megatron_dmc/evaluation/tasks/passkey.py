"""Passkey: a number said twice in a text that repeats itself.

Source: Mohtashami and Jaggi, arXiv 2305.16300, section 4.2. The wording is ours: scores are not those of other suites.
"""

from __future__ import annotations

from random import Random

from megatron_dmc.evaluation.tasks.base import Draft, Task, hide
from megatron_dmc.evaluation.tasks.words import number

NOISE = "The road is long. The river is wide. The night is quiet. On and on we walk, and nothing is new."
DIGITS = 5


class Passkey(Task):
    """What is the pass key?"""

    name = "passkey"
    max_new_tokens = 16
    has_depth = True

    def draft(self, random: Random, depth: float) -> Draft:
        """See :meth:`Task.draft`."""
        value = number(random, DIGITS)
        needle = f"The pass key is {value}. Remember it: {value} is the pass key."
        return Draft(
            introduction="A pass key is hidden in a long text without meaning. Find it and remember it.",
            haystack=lambda count: "\n".join(hide([NOISE] * count, [(depth, needle)])),
            question="What is the pass key?",
            answer_prefix="The pass key is",
            answers=(value,),
        )

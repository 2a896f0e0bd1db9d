"""Variable tracking: which variables have a value, when one is assigned to the next.

Source: RULER, arXiv 2404.06654, section 3.2: one chain of four hops. Sentences and wording are ours.
"""

from __future__ import annotations

from random import Random
from string import ascii_uppercase

from megatron_dmc.evaluation.tasks.base import Draft, Task, Units, hide
from megatron_dmc.evaluation.tasks.words import number, sentence

HOPS = 4
LETTERS = 5
DIGITS = 5


class VariableTracking(Task):
    """Which variables have the value?"""

    name = "variable_tracking"
    max_new_tokens = 80

    def draft(self, random: Random, depth: float) -> Draft:
        """See :meth:`Task.draft`; the links of the chain stand at depths of their own, in order."""
        names = _names(random, HOPS + 1)
        value = number(random, DIGITS)
        right_sides = [value, *names[:-1]]
        links = [f"VAR {name} = {right}" for name, right in zip(names, right_sides, strict=True)]
        depths = sorted(random.random() for _ in links)
        lines = Units(random, sentence)
        places = list(zip(depths, links, strict=True))
        return Draft(
            introduction="Follow the chain of variables that are assigned in the following text.",
            haystack=lambda count: "\n".join(hide(lines.first(count), places)),
            question=f"Find all variables that are assigned the value {value}, at once or by way of another variable.",
            answer_prefix=f"{len(names)} variables are assigned the value {value}. They are: VAR",
            answers=tuple(names),
        )


def _names(random: Random, count: int) -> list[str]:
    """Different names of capital letters."""
    names: list[str] = []
    while len(names) < count:
        name = "".join(random.choices(ascii_uppercase, k=LETTERS))
        if name not in names:
            names.append(name)
    return names

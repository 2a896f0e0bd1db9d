"""What a generated task is, and how its prompts get exactly the length that is asked for.

A task drafts a prompt around any amount of haystack. The haystack grows by whole units as far as they fit, and short
words at its end make up what is missing, token by token of the model's own tokenizer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

FILLERS = (" so", " and", " a", " x", ",", ".", "!", "-", "?", " on", " I", "\n")
"""What makes up for missing tokens; between them some tokenizer's pieces of one token are found."""


@dataclass(frozen=True)
class Draft:
    """A prompt whose haystack is still of any size.

    Attributes:
        introduction: before the haystack.
        haystack: so many units of it, with what is to be found.
        question: after it.
        answer_prefix: how the answer begins; part of the prompt.
        answers: texts that the answer must contain.
    """

    introduction: str
    haystack: Callable[[int], str]
    question: str
    answer_prefix: str
    answers: tuple[str, ...]

    def text(self, num_units: int, filler: str = "") -> str:
        """The prompt without the beginning of its answer."""
        return f"{self.introduction}\n{self.haystack(num_units)}{filler}\n{self.question}"


class Task(ABC):
    """One kind of question about a long text.

    Attributes:
        name: as users know it.
        max_new_tokens: that its answer may take.
        has_depth: whether what is to be found stands at one depth of the text.
    """

    name: str
    max_new_tokens: int
    has_depth: bool = False

    @abstractmethod
    def draft(self, random: Random, depth: float) -> Draft:
        """A new example.

        Args:
            random: decides everything in it.
            depth: share of the text before what is to be found, from 0 to 1.
        """


class Units:
    """Units of a haystack, made as they are asked for: the first n are the same whatever n.

    Args:
        random: seeds the units; the caller's own draws are not changed by how many are made.
        make: one unit.
    """

    def __init__(self, random: Random, make: Callable[[Random], str]) -> None:
        self._random, self._make = Random(random.getrandbits(64)), make
        self._made: list[str] = []

    def first(self, count: int) -> list[str]:
        """A new list of the first ``count``."""
        while len(self._made) < count:
            self._made.append(self._make(self._random))
        return self._made[:count]


def hide(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> list[str]:
    """Units with needles between them, each (depth, text) behind its share of the units."""
    result = list(units)
    # From the last to the first: an insertion moves only what stands behind it.
    for depth, needle in sorted(needles, key=lambda one: one[0], reverse=True):
        result.insert(round(depth * len(units)), needle)
    return result


def fit(draft: Draft, num_tokens: Callable[[str], int], length: int) -> str:
    """The prompt of exactly ``length`` tokens.

    Args:
        draft: of a task.
        num_tokens: of a prompt as the model reads it, from the text without the beginning of its answer.
        length: tokens.

    Raises:
        ValueError: the question alone is longer, or the tokenizer has no short pieces to make up the length.
    """
    least = num_tokens(draft.text(0))
    if least > length:
        raise ValueError(f"the question alone takes {least} tokens, {length} are left for it: give a greater length")
    low, high = 0, length
    while low < high:
        middle = (low + high + 1) // 2
        if num_tokens(draft.text(middle)) <= length:
            low = middle
        else:
            high = middle - 1
    filler = ""
    for word in FILLERS * 2:
        missing = length - num_tokens(draft.text(low, filler))
        if not missing:
            break
        each = num_tokens(draft.text(low, filler + word)) - length + missing
        if 0 < each <= missing:
            longer = filler + word * (missing // each)
            filler = longer if num_tokens(draft.text(low, longer)) <= length else filler + word
    text = draft.text(low, filler)
    if num_tokens(text) != length:
        raise ValueError(f"no text of exactly {length} tokens was found: give a length that differs by a few")
    return text


def score(answers: Sequence[str], text: str) -> float:
    """The share of the answers that a text contains, in either case of letters."""
    lower = text.lower()
    return sum(answer.lower() in lower for answer in answers) / len(answers)

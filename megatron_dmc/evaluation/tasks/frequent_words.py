"""Frequent words: the three most frequent words of a text whose words follow Zipf's law.

Source: RULER, arXiv 2404.06654, section 3.3 (``fwe``, with exponent 2). Words are made up of syllables, so that none is
known from elsewhere; counts are exact, not drawn.
"""

from __future__ import annotations

from random import Random

from megatron_dmc.evaluation.tasks.base import Draft, Task

EXPONENT = 2.0
NUM_ASKED = 3
NUM_FREQUENT = 12
"""Words that come more than once in a long text; the rest come once each."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
SYLLABLES = 3
ZETA = 1.6449340668482264
"""The sum of 1 / rank^2 over all ranks."""


class FrequentWords(Task):
    """Which words come most often?"""

    name = "frequent_words"
    max_new_tokens = 40

    def draft(self, random: Random, depth: float) -> Draft:
        """See :meth:`Task.draft`."""
        words = _MadeUpWords(random)
        frequent = words.first(NUM_FREQUENT)
        order = random.getrandbits(64)

        def haystack(count: int) -> str:
            text = [word for rank, word in enumerate(frequent, 1) for _ in range(int(count / ZETA / rank**EXPONENT))]
            # Those asked for lead by at least one, however short the text.
            text += [word for place, word in enumerate(frequent[:NUM_ASKED]) for _ in range(NUM_ASKED + 1 - place)]
            text += words.first(NUM_FREQUENT + max(0, count - len(text)))[NUM_FREQUENT:]
            Random(order).shuffle(text)
            return " ".join(text)

        return Draft(
            introduction="Read the following coded text and count how often each word comes.",
            haystack=haystack,
            question=f"Which {NUM_ASKED} words come most often in the coded text?",
            answer_prefix=f"The {NUM_ASKED} words that come most often are",
            answers=tuple(frequent[:NUM_ASKED]),
        )


class _MadeUpWords:
    """Different words, as many as are asked for; none is part of another, for all have one length."""

    def __init__(self, random: Random) -> None:
        self._random = Random(random.getrandbits(64))
        self._words: dict[str, None] = {}

    def first(self, count: int) -> list[str]:
        pick = self._random.choice
        while len(self._words) < count:
            self._words["".join(pick(CONSONANTS) + pick(VOWELS) for _ in range(SYLLABLES))] = None
        return list(self._words)[:count]

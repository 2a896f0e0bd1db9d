"""Generated tasks on the engine: examples of exact lengths, the answers to them, and their scores.

``length`` counts what the cache has to serve: the prompt with its first tokens and chat template, and the tokens that
the answer may take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from megatron_dmc.evaluation.estimate import Estimate
from megatron_dmc.evaluation.run_requests import run_requests
from megatron_dmc.evaluation.tasks import TASKS, Task
from megatron_dmc.evaluation.tasks.base import fit, score
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.support.progress import Advance

Form = Callable[[str, str], list[int]]
"""Token ids of a prompt as the model reads it, from its text and the beginning of its answer."""


@dataclass(frozen=True)
class Example:
    """One question."""

    task: str
    length: int
    depth: float
    """Share of the text before what is to be found; of a task without a depth, the number of the sample as a share."""
    seed: int
    prompt: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What the model wrote, and what its cache held in the end."""

    example: Example
    text: str
    score: float
    usage: CacheUsage

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        example = self.example
        return {
            "depth": example.depth,
            "seed": example.seed,
            "answers": list(example.answers),
            "text": self.text,
            "score": self.score,
            "entries": self.usage.num_entries,
            "bytes": self.usage.bytes_held,
        }


@dataclass(frozen=True)
class TaskResult:
    """One task at one length."""

    task: str
    length: int
    answers: list[Answer]

    @property
    def score(self) -> Estimate:
        """Over all questions."""
        return Estimate.of(torch.tensor([answer.score for answer in self.answers], dtype=torch.float64))

    @property
    def usage(self) -> CacheUsage:
        """What the caches held in the end, together."""
        return CacheUsage.total(answer.usage for answer in self.answers)

    def by_depth(self) -> list[tuple[float, float]]:
        """(depth, mean score over the seeds), from the beginning of the text to its end."""
        scores: dict[float, list[float]] = {}
        for answer in self.answers:
            scores.setdefault(answer.example.depth, []).append(answer.score)
        return [(depth, sum(found) / len(found)) for depth, found in sorted(scores.items())]

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        heads = self.usage.num_heads * len(self.answers)
        return {
            "task": self.task,
            "length": self.length,
            "has_depth": TASKS[self.task].has_depth,
            "num_questions": len(self.answers),
            "score": self.score.mean,
            "score_standard_error": self.score.standard_error,
            "score_by_depth": [list(pair) for pair in self.by_depth()],
            "entries_at_the_end": self.usage.num_entries / heads,
            "bytes_at_the_end": self.usage.bytes_held / len(self.answers),
            "compression_ratio": self.usage.compression_ratio,
            "answers": [answer.to_dict() for answer in self.answers],
        }


def make_examples(task: Task, form: Form, length: int, num_depths: int, seeds: Iterable[int]) -> list[Example]:
    """Questions at evenly spaced depths, the same for every model of the same tokenizer and form.

    Args:
        task: what is asked.
        form: how the model reads a prompt.
        length: tokens of prompt and answer together.
        num_depths: from the beginning of the text to its end; a task without a depth has so many samples.
        seeds: each gives a question at every depth.

    Raises:
        ValueError: a length that has no room for the question, or a number below 1.
    """
    if num_depths < 1:
        raise ValueError(f"depths={num_depths}: must be at least 1")
    return [
        _example(task, form, length, number / max(1, num_depths - 1), seed)
        for seed in seeds
        for number in range(num_depths)
    ]


def _example(task: Task, form: Form, length: int, depth: float, seed: int) -> Example:
    # A text as the seed gives the same numbers on every machine and in every process.
    draft = task.draft(Random(f"{task.name} {length} {depth:.6f} {seed}"), depth)

    def ids(text: str) -> list[int]:
        return form(text, draft.answer_prefix)

    try:
        text = fit(draft, lambda text: len(ids(text)), length - task.max_new_tokens)
    except ValueError as error:
        raise ValueError(f"task {task.name} at length {length}: {error}") from error
    return Example(task.name, length, depth, seed, ids(text), draft.answers)


def answer(
    engine: Engine, examples: Sequence[Example], end_tokens: frozenset[int], advance: Advance | None = None
) -> list[Answer]:
    """Let the engine answer, greedily.

    Args:
        engine: with the decode of the model's tokenizer.
        examples: of any tasks and lengths.
        end_tokens: each ends an answer.
        advance: called with numbers of new tokens.

    Raises:
        ValueError: a prompt that is too long for the model.
        InfrastructureError: there was not the memory to answer one.
    """
    requests = [
        Request(
            example.prompt,
            SamplingParams(max_new_tokens=TASKS[example.task].max_new_tokens, end_tokens=end_tokens),
        )
        for example in examples
    ]
    run_requests(engine, requests, advance)
    answers = []
    for example, request in zip(examples, requests, strict=True):
        assert request.usage is not None
        answers.append(Answer(example, request.text, score(example.answers, request.text), request.usage))
    return answers

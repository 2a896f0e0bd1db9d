"""A soak: thousands of requests of every kind through a cache that is always full, some of them cancelled.

    python -m examples.benchmarks.soak [--requests 20000] [--json OUT]

A small random model that merges; requests of random lengths and settings, several samples of a prompt, stop strings,
turns that follow a kept request, cancellations. Goals: no request is lost, every text is the one that its request has
undisturbed in a roomy engine, and the cache is empty in the end. Texts may part where two tokens are equally likely to
rounding, or a decision stands at its threshold: such ones are checked, counted, and at most one in a thousand.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.measure import Row, add_output_argument, report
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.decoder.layer_attention import DecisionTrace
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams, penalize, sample
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import by_hf_name

SHAPE = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=48,
    vocab_size=60,
    max_position_embeddings=256,
    dtype="float32",
)
BLOCK_SIZE = 4
NUM_BLOCKS = 100
"""About twice the largest request, a tenth of what the sequences could need."""
MAX_SEQUENCES = 16
PREFILL_TOKENS = 48
WAITING = 48
"""Requests that are in the engine at any time, running or waiting."""
STEPS_BETWEEN_CHECKS = 200
MARGIN = 1e-4
"""Rounding of logits between two paths, by the contract that they share."""
PERTURBATIONS = 200


class RandomSource:
    """A model with random weights of unit gain, as ``open_source`` would give it."""

    def __init__(self, config: ModelConfig, dmc: DMCConfig, seed: int) -> None:
        self.config, self.dmc = config, dmc
        self._rows = by_hf_name(config)
        self._places = {name: seed + place for place, name in enumerate(self._rows)}

    def tensor(self, name: str) -> Tensor:
        """A tensor by its name; norms are ones."""
        entry, place = self._rows[name]
        shape = entry.hf_shapes(self.config)[place]
        if len(shape) == 1:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(self._places[name])
        return torch.randn(shape, generator=generator) * (2.0 if "embed" in name else 1.5 / shape[-1] ** 0.5)


def letters(ids: Sequence[int]) -> str:
    """Text of ids, one letter each."""
    return "".join(chr(ord("A") + number) for number in ids)


@dataclasses.dataclass
class Outcome:
    """What a soak found."""

    num_requests: int = 0
    num_cancelled: int = 0
    num_lost: int = 0
    num_different: int = 0
    num_ties: int = 0
    num_preempted: int = 0
    num_blocks_left: int = 0
    least_free_blocks: int = NUM_BLOCKS
    num_tokens: int = 0
    seconds: float = 0.0


def soak(num_requests: int, seed: int = 0) -> Outcome:
    """Run the requests disturbed and undisturbed, and compare.

    Raises:
        AssertionError: the books of the cache do not agree.
    """
    model = Decoder(RandomSource(SHAPE, DMCConfig(decision_bias=-0.7), seed))
    draw, outcome = random.Random(seed), Outcome()
    engine = Engine(
        model,
        decode=letters,
        max_sequences=MAX_SEQUENCES,
        block_size=BLOCK_SIZE,
        num_blocks=NUM_BLOCKS,
        prefill_tokens=PREFILL_TOKENS,
    )
    _count_preemptions(engine, outcome)
    start = time.perf_counter()
    requests = _disturbed(engine, draw, num_requests, outcome)
    outcome.seconds = time.perf_counter() - start
    outcome.num_blocks_left = engine.runner.cache.blocks.num_in_use + engine.runner.cache.rows.num_in_use
    compare(model, requests, outcome)
    return outcome


def _disturbed(engine: Engine, draw: random.Random, num_requests: int, outcome: Outcome) -> list[Request]:
    """Keep the engine full until all requests ended; returns them."""
    requests: list[Request] = []
    unfinished: list[Request] = []
    kept: list[Request] = []
    num_steps = 0
    while unfinished or len(requests) < num_requests:
        while len(unfinished) < WAITING and len(requests) < num_requests:
            group = _group(draw, kept)
            engine.submit(group)
            requests += group
            unfinished += group
        if draw.random() < 0.05:
            engine.abort(draw.choice(unfinished))
        engine.step()
        num_steps += 1
        kept += [request for request in unfinished if request.finish_reason and request.keep]
        unfinished = [request for request in unfinished if not request.finish_reason]
        if num_steps % STEPS_BETWEEN_CHECKS == 0:
            engine.runner.cache.check_integrity()
        outcome.least_free_blocks = min(outcome.least_free_blocks, engine.runner.cache.blocks.num_free)
    for request in kept:
        engine.forget(request)
    engine.runner.cache.check_integrity()
    return requests


def _group(draw: random.Random, kept: list[Request]) -> list[Request]:
    """One request, several samples of a prompt, or the next turn of one that was kept."""
    sampling = _sampling(draw)
    if kept and draw.random() < 0.7:
        before = kept.pop(draw.randrange(len(kept)))
        prompt = before.tokens(0) + _tokens(draw, draw.randint(1, 10))
        if len(prompt) + sampling.max_new_tokens <= SHAPE.max_position_embeddings:
            return [Request(prompt, sampling, keep=draw.random() < 0.5, follows=before)]
    length = min(int(draw.lognormvariate(2.8, 1.0)) + 1, 150)
    first = Request(_tokens(draw, length), sampling, keep=draw.random() < 0.1)
    return first.samples(1 if first.keep else draw.choice((1, 1, 1, 2, 4)))


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(SHAPE.vocab_size) for _ in range(count)]


def _sampling(draw: random.Random) -> SamplingParams:
    stop = tuple(letters(_tokens(draw, draw.randint(1, 2))) for _ in range(draw.choice((0, 0, 1, 2))))
    return SamplingParams(
        max_new_tokens=draw.randint(1, 40),
        temperature=draw.choice((0.0, 0.7, 1.0)),
        top_k=draw.choice((0, 0, 5, 30)),
        top_p=draw.choice((1.0, 1.0, 0.9)),
        min_p=draw.choice((0.0, 0.0, 0.05)),
        repetition_penalty=draw.choice((1.0, 1.0, 1.2)),
        seed=draw.randrange(1 << 30),
        end_tokens=frozenset(_tokens(draw, draw.choice((0, 0, 1)))),
        stop=stop,
        logprobs=draw.choice((None, None, 1)),
    )


def _count_preemptions(engine: Engine, outcome: Outcome) -> None:
    give_back = engine.scheduler.give_back

    def counted(requests: Sequence[Request]) -> None:
        outcome.num_preempted += len(requests)
        give_back(requests)

    engine.scheduler.give_back = counted  # type: ignore[method-assign]


def compare(model: Decoder, requests: Sequence[Request], outcome: Outcome) -> None:
    """Every text beside the one that its request has in an engine with room for all, on its own."""
    alone = [Request(request.prompt, request.sampling) for request in requests]
    roomy = Engine(model, decode=letters, max_sequences=64)
    roomy.submit(alone)
    while roomy.is_busy:
        roomy.step()
    for request, expected in zip(requests, alone, strict=True):
        outcome.num_requests += 1
        outcome.num_tokens += len(request.output)
        outcome.num_cancelled += request.finish_reason == "aborted"
        outcome.num_lost += request.finish_reason in (None, "error")
        if not _agrees(request, expected):
            is_tie = _is_tie(model, request, expected)
            outcome.num_ties += is_tie
            outcome.num_different += not is_tie


def _agrees(request: Request, expected: Request) -> bool:
    """Tokens and text are the same, up to where the request was cancelled."""
    if request.finish_reason == "aborted":
        return request.output == expected.output[: len(request.output)] and expected.text.startswith(
            request.text[: len(expected.text)]
        )
    return (request.output, request.text, request.finish_reason) == (
        expected.output,
        expected.text,
        expected.finish_reason,
    )


def _is_tie(model: Decoder, request: Request, expected: Request) -> bool:
    """Whether rounding explains where two texts part: logits moved by as little give both tokens, or a decision is
    at its threshold."""
    place = next(_differences(request.output, expected.output), None)
    if place is None:
        return False
    tokens = request.tokens(0, len(request.prompt) + place)
    trace = DecisionTrace()
    logits_V = model.logits(model.forward(torch.tensor(tokens).unsqueeze(1), trace))[-1, 0]
    if any((logits.abs() < MARGIN).any() for logits in trace.logits):
        return True
    draws = random.Random(request.sampling.seed)
    uniform = [draws.random() for _ in range(place + 1)][-1]
    moved_BV = logits_V + MARGIN * (2 * torch.rand(PERTURBATIONS, len(logits_V)) - 1)
    seen_V = torch.zeros(len(logits_V), dtype=torch.bool)
    seen_V[tokens] = True
    penalty_B = torch.full((PERTURBATIONS,), request.sampling.repetition_penalty)
    scores_BV = penalize(moved_BV, penalty_B, seen_V.expand_as(moved_BV))
    return len(set(sample(scores_BV, [request.sampling] * PERTURBATIONS, [uniform] * PERTURBATIONS).tolist())) > 1


def _differences(first: Sequence[int], second: Sequence[int]) -> Iterator[int]:
    """Places where two texts differ; the end of the shorter one is one."""
    yield from (place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    if len(first) != len(second):
        yield min(len(first), len(second))


def rows(num_requests: int, seed: int) -> Iterator[Row]:
    """What was found, beside what must hold."""
    outcome = soak(num_requests, seed)
    conditions: dict[str, Any] = {
        "requests": outcome.num_requests,
        "blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "sequences": MAX_SEQUENCES,
        "seed": seed,
    }
    yield Row("requests lost", outcome.num_lost, "", conditions, goal=0)
    yield Row("texts that differ", outcome.num_different, "", conditions, goal=0)
    yield Row("texts that part at a tie", outcome.num_ties, "", conditions, goal=outcome.num_requests / 1000)
    yield Row("blocks and rows held in the end", outcome.num_blocks_left, "", conditions, goal=0)
    yield Row("requests cancelled", outcome.num_cancelled, "", conditions)
    yield Row("preemptions", outcome.num_preempted, "", conditions)
    yield Row("fewest free blocks", outcome.least_free_blocks, "", conditions)
    yield Row("tokens written", outcome.num_tokens, "", conditions)
    yield Row("time", outcome.seconds, "s", conditions)


def main() -> None:
    """Soak and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    add_output_argument(parser)
    given = parser.parse_args()
    report(rows(given.requests, given.seed), given.json)


if __name__ == "__main__":
    main()

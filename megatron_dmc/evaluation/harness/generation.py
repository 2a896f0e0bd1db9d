"""Texts for benchmarks, by the engine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.evaluation.harness.continuations import Scorer
from megatron_dmc.evaluation.run_requests import run_requests
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.support.progress import progress


def generate(scorer: Scorer, tokenizer: Tokenizer, requests: Sequence[Request]) -> None:
    """Continue requests by an engine of the scorer's model, and add what the cache held to its usages.

    Raises:
        InfrastructureError: there was not the memory for one of them.
    """
    engine = Engine(
        scorer.model,
        decode=tokenizer.decode,
        max_sequences=min(scorer.batch_size, len(requests)),
        **scorer.storage._asdict(),
    )
    with progress("generating", sum(request.sampling.max_new_tokens for request in requests), "tokens") as advance:
        run_requests(engine, requests, advance)
    scorer.usages += [request.usage for request in requests if request.usage is not None]

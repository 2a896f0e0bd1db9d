"""Whether a model writes the text that a reference writes: both continue the same prompts, greedily.

Two texts that part seldom meet again, so two figures are kept: the share of places with the same token, and how far
they go together. Prompts are read as the engine reads them: by H2O and TOVA densely, and cut at their end.

Legend: N prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from megatron_dmc.evaluation.estimate import Estimate
from megatron_dmc.evaluation.run_requests import run_requests
from megatron_dmc.evaluation.scores import DEFAULT_STORAGE, Storage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.support.progress import Advance


@dataclass(frozen=True)
class GreedyMatch:
    """Over all prompts, as shares of the new tokens."""

    num_prompts: int
    prompt_length: int
    num_new_tokens: int
    """Of each prompt."""
    equal_tokens: Estimate
    common_prefix: Estimate
    """Tokens before the first that differs."""
    identical_texts: float
    """Share of the prompts whose texts are equal to the end."""

    def to_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            "num_prompts": self.num_prompts,
            "prompt_length": self.prompt_length,
            "num_new_tokens": self.num_new_tokens,
            "equal_tokens": self.equal_tokens.mean,
            "equal_tokens_standard_error": self.equal_tokens.standard_error,
            "common_prefix": self.common_prefix.mean,
            "common_prefix_standard_error": self.common_prefix.standard_error,
            "identical_texts": self.identical_texts,
        }


def greedy_match(
    model: Decoder,
    reference: Decoder,
    prompts: Sequence[Sequence[int]],
    num_new_tokens: int,
    *,
    storage: Storage = DEFAULT_STORAGE,
    batch_size: int = 32,
    advance: Advance | None = None,
) -> GreedyMatch:
    """Continue prompts with both models by the engine. No token ends a text, so that all are equally long.

    Args:
        model, reference: of one vocabulary.
        prompts: token ids, equally long.
        num_new_tokens: per prompt, at least 1.
        storage: of the model's cache; the reference's is in its own dtype.
        batch_size: texts at once.
        advance: called with numbers of new tokens.

    Raises:
        ValueError: a prompt that leaves no room for the new tokens.
        InfrastructureError: there was not the memory to continue one.
    """
    plain = Storage(block_size=storage.block_size)
    ours = _continue(model, prompts, num_new_tokens, storage, batch_size, advance)
    theirs = _continue(reference, prompts, num_new_tokens, plain, batch_size, advance)
    equal = [[a == b for a, b in zip(*pair, strict=True)] for pair in zip(ours, theirs, strict=True)]
    prefixes = [sum(takewhile(bool, places)) for places in equal]
    return GreedyMatch(
        num_prompts=len(prompts),
        prompt_length=len(prompts[0]),
        num_new_tokens=num_new_tokens,
        equal_tokens=_share([sum(places) for places in equal], num_new_tokens),
        common_prefix=_share(prefixes, num_new_tokens),
        identical_texts=sum(all(places) for places in equal) / len(prompts),
    )


def _share(counts: Sequence[int], whole: int) -> Estimate:
    return Estimate.of(torch.tensor(counts, dtype=torch.float64) / whole)


def _continue(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    num_new_tokens: int,
    storage: Storage,
    batch_size: int,
    advance: Advance | None,
) -> list[list[int]]:
    """The new tokens of each prompt."""
    engine = Engine(model, max_sequences=min(batch_size, len(prompts)), **storage._asdict())
    requests = [Request(list(prompt), SamplingParams(max_new_tokens=num_new_tokens)) for prompt in prompts]
    run_requests(engine, requests, advance)
    return [request.output for request in requests]

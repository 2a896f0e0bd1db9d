"""Text from prompts: schedule, run the model, post-process."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.sampling import SamplingParams, sample

DEFAULT_MAX_SEQUENCES = 32
MAX_PREFILL_TOKENS = 16384
"""Prompts are read together as long as their number times the longest stays below; a longer one is read alone."""


@dataclass(frozen=True)
class Batch:
    """Requests that the model reads together: whole prompts, or the newest token of each."""

    requests: list[Request]
    is_prefill: bool


class Engine:
    """Continues prompts of different lengths together; a request that is done makes room for one that waits.

    Args:
        model: to decode with.
        max_sequences: requests in the cache at once.
        block_size: entries per block of the cache.
        num_blocks: blocks of the cache; None lets it grow.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("num_blocks", num_blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model = model
        self.cache = model.new_cache(max_sequences, block_size=block_size, num_blocks=num_blocks)
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._waiting or self._running)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Request]:
        """Continue every prompt; results in the order of the prompts.

        Raises:
            ValueError: an empty or too long prompt, a token outside the vocabulary; nothing was read.
            OutOfBlocks: a cache of fixed size is exhausted; all requests are given up.
        """
        requests = [Request(list(prompt), sampling) for prompt in prompts]
        self.submit(requests)
        while self.is_busy:
            self.step()
        return requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their turn.

        Raises:
            ValueError: see :meth:`generate`; no request was accepted.
        """
        for index, request in enumerate(requests):
            self._check(index, request)
        self._waiting.extend(requests)

    def step(self) -> None:
        """One pass through the model: the prompts of new requests, or one token of all running ones."""
        try:
            batch = self._schedule()
            logits_BV = self._run(batch)
            self._finish(batch, logits_BV)
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Give up all requests and free their memory."""
        self.cache.free_sequences(self._rows(self._running))
        self._running.clear()
        self._waiting.clear()

    def _schedule(self) -> Batch:
        """New requests as long as there is room, otherwise the running ones."""
        admitted: list[Request] = []
        longest = 0
        while self._waiting and len(admitted) < self.cache.num_free_sequences:
            longest = max(longest, len(self._waiting[0].prompt))
            if admitted and longest * (len(admitted) + 1) > MAX_PREFILL_TOKENS:
                break
            admitted.append(self._waiting.popleft())
        if not admitted:
            return Batch(list(self._running), is_prefill=False)
        for request, row in zip(admitted, self.cache.add_sequences(len(admitted)).tolist(), strict=True):
            request.row = row
        self._running.extend(admitted)
        return Batch(admitted, is_prefill=True)

    def _run(self, batch: Batch) -> Tensor:
        """Logits [B, V] of the next token of each request."""
        rows_B, device = self._rows(batch.requests), self.model.device
        if not batch.is_prefill:
            token_B = torch.tensor([request.newest_token for request in batch.requests], device=device)
            return self.model.logits(self.model.decode(token_B, self.cache, rows_B))
        length_B = torch.tensor([len(request.prompt) for request in batch.requests], device=device)
        token_BS = torch.zeros(len(batch.requests), int(length_B.max()), dtype=torch.int64)
        for row, request in enumerate(batch.requests):
            token_BS[row, : len(request.prompt)] = torch.tensor(request.prompt)
        hidden_SBH = self.model.prefill(token_BS.T.to(device), length_B, self.cache, rows_B)
        return self.model.logits(hidden_SBH[length_B - 1, torch.arange(len(length_B), device=device)])

    def _finish(self, batch: Batch, logits_BV: Tensor) -> None:
        """Sample, and free the requests that are done."""
        device, samplings = logits_BV.device, [request.sampling for request in batch.requests]
        token_B = sample(
            logits_BV,
            torch.tensor([sampling.temperature for sampling in samplings], device=device),
            torch.tensor([sampling.top_p for sampling in samplings], device=device, dtype=torch.float64),
            torch.tensor([request.draw() for request in batch.requests], device=device, dtype=torch.float64),
        )
        for request, token in zip(batch.requests, token_B.tolist(), strict=True):
            request.receive(token)
        done = [request for request in batch.requests if request.finish_reason]
        for request in done:
            request.usage = CacheUsage.of(self.cache, self._rows([request]))
            self.cache.free_sequences(self._rows([request]))
        self._running = [request for request in self._running if not request.finish_reason]

    def _rows(self, requests: Sequence[Request]) -> Tensor:
        return torch.tensor([request.row for request in requests], dtype=torch.int64, device=self.cache.device)

    def _check(self, index: int, request: Request) -> None:
        config, length = self.model.config, len(request.prompt)
        if not length:
            raise ValueError(f"prompt {index} is empty: give at least one token")
        if not 0 <= min(request.prompt) <= max(request.prompt) < config.vocab_size:
            outside = next(token for token in request.prompt if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"prompt {index} holds token {outside}: the model's vocabulary is 0..{config.vocab_size - 1}; "
                "give the tokenizer that the model was trained with"
            )
        limit = config.max_position_embeddings
        if length + request.sampling.max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {length} tokens and may grow by {request.sampling.max_new_tokens}: the model "
                f"reads at most {limit}; shorten the prompt or lower max_new_tokens"
            )

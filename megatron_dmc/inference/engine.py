"""Text from prompts: schedule, run the model, post-process.

The scheduler decides who reads, the cache remembers, the model runner computes; here they meet.

Legend: B requests of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.model_runner import ModelRunner
from megatron_dmc.inference.request import FinishReason, Request
from megatron_dmc.inference.sampling import SamplingParams, sample
from megatron_dmc.inference.scheduler import DEFAULT_PREFILL_TOKENS, Batch, Scheduler

DEFAULT_MAX_SEQUENCES = 32


class Engine:
    """Continues prompts of different lengths together; a request that is done makes room for one that waits.

    Where a cache of fixed size is full, the newest request gives its memory back, waits, and is read again later; its
    text is the same. Only a request that does not fit alone fails.

    Args:
        model: to decode with.
        max_sequences: requests in the cache at once.
        block_size: entries per block of the cache.
        num_blocks: blocks of the cache; None lets it grow.
        prefill_tokens: tokens of prompts per pass.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("num_blocks", num_blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model = model
        self.scheduler = Scheduler(prefill_tokens, reads_parts=model.method.reads_parts)
        self.runner = ModelRunner(model, max_sequences, block_size, num_blocks)

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.is_busy

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[Request]:
        """Continue every prompt; results in the order of the prompts. One that failed says so.

        Raises:
            ValueError: an empty or too long prompt, a token outside the vocabulary; nothing was read.
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
        self.scheduler.add(requests)

    def step(self) -> None:
        """One pass through the model: prompts, or a part of one, or one token of all running requests."""
        try:
            batch = self._schedule()
            if batch.requests:
                self._finish(batch, self.runner.run(batch))
        except BaseException:
            self.abort_all()
            raise

    def abort(self, request: Request) -> None:
        """Give one request up and free its memory; others go on."""
        self._end(request, "aborted")

    def abort_all(self) -> None:
        """Give all requests up and free their memory."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._end(request, "aborted")

    def _schedule(self) -> Batch:
        """The next batch, with its memory reserved."""
        while True:
            batch = self.scheduler.next(self.runner.cache.rows.num_free)
            if not batch.requests:
                return batch
            try:
                self.runner.reserve(batch)
            except OutOfBlocks as full:
                self._make_room(batch, full)
            else:
                return batch

    def _make_room(self, batch: Batch, full: OutOfBlocks) -> None:
        """The newest request waits; where it is alone, or could not be read again, it fails."""
        newest = self.scheduler.running[-1]
        is_alone = len(self.scheduler.running) == 1
        if is_alone or (newest.num_read and not self.model.method.exact_recompute):
            newest.fail(str(full))
            self._end(newest, "error")
            return
        self.runner.release(newest)
        self.scheduler.give_back([newest])

    def _finish(self, batch: Batch, logits_BV: Tensor) -> None:
        """Sample where a request has nothing left to read, and free the requests that are done."""
        places = [index for index, request in enumerate(batch.requests) if not request.num_unread]
        requests = [batch.requests[index] for index in places]
        if not requests:
            return
        logits_BV = logits_BV[places]
        sane = logits_BV.isfinite().all(dim=-1).tolist()
        for request, token, is_sane in zip(requests, self._sample(requests, logits_BV), sane, strict=True):
            if is_sane:
                _deliver(request, token)
            else:
                request.fail("the model's logits are not finite: its weights or dtype are at fault")
            if request.finish_reason:
                self._end(request, request.finish_reason)

    def _sample(self, requests: Sequence[Request], logits_BV: Tensor) -> list[int]:
        device, samplings = logits_BV.device, [request.sampling for request in requests]
        return sample(
            logits_BV.nan_to_num(),
            torch.tensor([sampling.temperature for sampling in samplings], device=device),
            torch.tensor([sampling.top_p for sampling in samplings], device=device, dtype=torch.float64),
            torch.tensor([request.draw() for request in requests], device=device, dtype=torch.float64),
        ).tolist()

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        if request.row is not None:
            request.usage = self.runner.usage(request)
            self.runner.release(request)
        self.scheduler.remove(request)

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


def _deliver(request: Request, token: int) -> None:
    """Hand a token over; who listens to it may fail, which is that request's affair."""
    try:
        request.receive(token)
    except Exception as error:
        request.fail(f"its listener failed: {error}")

"""Text from prompts: schedule, run the model, post-process.

The scheduler decides who reads, the cache remembers, the model runner computes; here they meet.

Legend: B requests of a batch, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.expectation import Expectation
from megatron_dmc.inference.logprobs import TokenLogprob
from megatron_dmc.inference.model_runner import ModelRunner
from megatron_dmc.inference.request import FinishReason, Request, check_request
from megatron_dmc.inference.sampler import Sampler
from megatron_dmc.inference.sampling import SamplingParams
from megatron_dmc.inference.scheduler import DEFAULT_PREFILL_TOKENS, Batch, Scheduler
from megatron_dmc.inference.speed import Speed
from megatron_dmc.inference.text_stream import Decode, TextStream
from megatron_dmc.ops.kv_quantization import AUTO

DEFAULT_MAX_SEQUENCES = 32


class Engine:
    """Continues prompts of different lengths together; a request that is done makes room for one that waits.

    Where the cache is full, what nobody runs is forgotten first; then the newest request gives its memory
    back, waits, and is read again later: its text is the same. Only a request that does not fit alone fails.

    With a cache of 8 bits that text is as likely as before, not the same: what was decoded is read again in one pass,
    whose tokens see one another before they are quantised, and a close choice may fall otherwise.

    Args:
        model: to decode with. Where ranks share it, each has an engine and asks the same of it in the same order; a
            listener that fails on one ends them all.
        decode: ids to text, of the model's tokenizer; without it there are tokens alone.
        max_sequences: requests in the cache at once.
        block_size: entries per block of the cache.
        num_blocks: blocks of the cache; None: as many as the sequences can need, as far as there is memory.
        prefill_tokens: tokens of prompts per pass.
        kv_dtype: what the cache stores closed entries as: ``auto`` (as the model), ``fp8`` or ``int8``.

    Attributes:
        speed: what was read and decoded so far, and how fast.

    Raises:
        ValueError: a size below 1, or an unknown format.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        decode: Decode | None = None,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        prefill_tokens: int = DEFAULT_PREFILL_TOKENS,
        kv_dtype: str = AUTO.name,
    ) -> None:
        for name, value in (("max_sequences", max_sequences), ("num_blocks", num_blocks)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self.model = model
        self.decode = decode
        self.expectation = _expectation(model, block_size)
        self.scheduler = Scheduler(self.expectation, prefill_tokens, reads_parts=model.method.reads_parts)
        self.runner = ModelRunner(model, max_sequences, block_size, num_blocks, kv_dtype)
        self.sampler = Sampler()
        self.speed = Speed()
        self._idle: list[Request] = []
        """Requests that had or have memory without running: kept ones, and those that wait with what they follow."""

    @property
    def is_busy(self) -> bool:
        """Whether a request waits or runs."""
        return self.scheduler.is_busy

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, n: int = 1) -> list[Request]:
        """Continue every prompt ``n`` times; results in the order of the prompts. One that failed says so.

        Raises:
            ValueError: see :meth:`submit`; nothing was read.
        """
        requests = [sample for prompt in prompts for sample in Request(list(prompt), sampling).samples(n)]
        self.submit(requests)
        while self.is_busy:
            self.step()
        return requests

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for their turn; samples of one prompt are submitted together.

        Raises:
            ValueError: an empty or too long prompt, a token outside the vocabulary, text asked for without a
                tokenizer; no request was accepted.
        """
        for index, request in enumerate(requests):
            check_request(index, request, self.model.config)
            if self.decode is None and (request.sampling.stop or request.on_text):
                raise ValueError(f"prompt {index} asks for text or stop strings: give the engine a tokenizer's decode")
        together = set(requests)
        for request in requests:
            if request.source not in together:
                request.source = None
            if self.decode is not None:
                request.stream = TextStream(self.decode, request.prompt, request.sampling.stop)
            self._continue_kept(request)
        self.scheduler.add(requests)

    def step(self) -> None:
        """One pass through the model: prompts, or a part of one, or one token of all running requests."""
        try:
            start = time.perf_counter()
            batch = self._schedule()
            if not batch.requests:
                return
            logits_BV = self._run(batch)
            if logits_BV is not None:
                self._finish(batch, logits_BV)
                self.speed.add(sum(batch.counts), time.perf_counter() - start, decodes=batch.decodes)
        except BaseException:
            self.abort_all()
            raise

    def abort(self, request: Request) -> None:
        """Give one request up and free its memory, unless it is to be kept; others go on."""
        if request.finish_reason is None:
            self._end(request, "aborted")

    def abort_all(self) -> None:
        """Give all requests up and free their memory."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            request.keep = False
            self._end(request, "aborted")

    def forget(self, request: Request) -> None:
        """Free the memory of a kept request."""
        if request.finish_reason is not None:
            self.runner.release(request)

    def _schedule(self) -> Batch:
        """The next batch, with its memory reserved."""
        while True:
            num_free_blocks = self.runner.num_free_blocks if self.scheduler.waiting else 0
            batch = self.scheduler.next(self.runner.num_free_rows, num_free_blocks)
            if self.scheduler.is_short and self._forget_idle():
                continue
            if not batch.requests:
                return batch
            try:
                self.runner.reserve(batch)
            except OutOfBlocks as full:
                self._make_room([self.scheduler.running[-1]], full)
            else:
                return batch

    def _run(self, batch: Batch) -> Tensor | None:
        """Logits [B, V]; None where more of the prompts survived than there was memory for."""
        try:
            return self.runner.run(batch)
        except OutOfBlocks as full:
            self.expectation.forget()
            self._make_room(batch.requests, full)
            for request in batch.requests:
                self.runner.release(request)
            return None

    def _make_room(self, requests: Sequence[Request], full: OutOfBlocks) -> None:
        """What nobody runs is forgotten, or else ``requests`` wait; one that is alone or cannot be read again fails."""
        if self._forget_idle():
            return
        newest = requests[-1]
        is_alone = len(self.scheduler.running) == 1
        if is_alone or (newest.num_read and not self.model.method.exact_recompute):
            newest.fail(str(full))
            self._end(newest, "error")
            return
        for request in requests:
            self.runner.release(request)
        self.scheduler.give_back(requests)

    def _forget_idle(self) -> bool:
        """Free the memory of one request that does not run; whether there was any."""
        while self._idle:
            request = self._idle.pop(0)
            if request.row is not None and request not in self.scheduler.running:
                self.runner.release(request)
                return True
        return False

    def _note_idle(self, request: Request) -> None:
        self._idle = [one for one in self._idle if one.row is not None and one is not request] + [request]

    def _continue_kept(self, request: Request) -> None:
        """Take the memory of the request that this one follows, or free it where it is of no use."""
        kept, request.follows = request.follows, None
        if kept is None or kept.row is None or kept.finish_reason is None:
            return
        asks_for_all = request.sampling.prompt_logprobs
        if self.model.method.reads_parts and request.extends(kept) and not asks_for_all:
            self.runner.hand_over(kept, request)
            self._note_idle(request)
        else:
            self.runner.release(kept)

    def _finish(self, batch: Batch, logits_BV: Tensor) -> None:
        """Sample where a request has nothing left to read, and free the requests that are done."""
        requests, places = self._with_samples(batch)
        if not requests:
            return
        if places != list(range(len(logits_BV))):
            logits_BV = logits_BV[places]
        sane = logits_BV.isfinite().all(dim=-1).tolist()
        if not all(sane):
            logits_BV = logits_BV.nan_to_num()
        tokens = self.sampler.next_tokens(requests, logits_BV)
        logprobs = self.sampler.logprobs(requests, logits_BV, tokens)
        for request, token, logprob, is_sane in zip(requests, tokens, logprobs, sane, strict=True):
            if is_sane:
                self._deliver(request, token, logprob)
            else:
                request.fail("the model's logits are not finite: its weights or dtype are at fault")
            if request.finish_reason:
                self._end(request, request.finish_reason)

    def _deliver(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        """Hand a token over; who listens to its text may fail, which is that request's affair."""
        try:
            request.receive(token, logprob)
        except Exception as error:
            if self.model.parallel.size > 1:
                # The other ranks would go on with this request.
                raise
            request.fail(f"its listener failed: {error}")

    def _with_samples(self, batch: Batch) -> tuple[list[Request], list[int]]:
        """Requests that read everything, with the samples that share their prompts, and their places in a batch."""
        requests, places = [], []
        for place, request in enumerate(batch.requests):
            if request.num_unread:
                continue
            if not request.output:
                self._learn(request)
            for one in (request, *self._fork(request)):
                requests.append(one)
                places.append(place)
        return requests, places

    def _fork(self, source: Request) -> list[Request]:
        """The samples of a prompt that go on from its memory; those that find no room read it on their own."""
        samples = self.scheduler.take_samples(source)[: self.runner.num_free_rows]
        if not samples:
            return []
        try:
            self.runner.fork(source, samples)
        except OutOfBlocks:
            return []
        self.scheduler.start(samples, source)
        return samples

    def _learn(self, request: Request) -> None:
        """Let what the cache holds of a request count among what is expected of others."""
        self.expectation.observe_held(self.runner.num_blocks(request), request.num_read)

    def _end(self, request: Request, reason: FinishReason) -> None:
        request.end(reason)
        if request.row is not None and request.num_read:
            request.usage = self.runner.usage(request)
            if reason != "aborted":
                # Ranks learn together; one that gives up may be alone.
                self._learn(request)
        if reason in ("eod", "stop", "length"):
            self.expectation.observe_written(request)
        if request.keep and reason != "error":
            self._note_idle(request)
        else:
            self.runner.release(request)
        self.scheduler.remove(request)


def _expectation(model: Decoder, block_size: int) -> Expectation:
    """The worst case by the length of a text, or by what its method keeps at most where it cannot be read again."""
    method = model.method
    return Expectation(
        model.config.num_layers * model.config.num_kv_heads,
        block_size,
        most_entries=None if method.exact_recompute else method.expected_entries,
        learns=method.exact_recompute,
        shares=method.only_newest_changes,
    )

"""Runs a batch of requests through the model and the cache: rows, packed tokens, logits of the newest.

Legend: B requests of a batch, T their tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.logprobs import LOGITS_AT_ONCE, token_logprobs
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.scheduler import Batch
from megatron_dmc.ops.kv_quantization import AUTO


class ModelRunner:
    """A model and the memory of its requests.

    Args:
        model: to decode with.
        max_sequences: requests in the cache at once.
        block_size: entries per block of the cache.
        num_blocks: blocks of the cache; None: as many as the sequences can need, as far as there is memory.
        kv_dtype: what the cache stores closed entries as.
    """

    def __init__(
        self, model: Decoder, max_sequences: int, block_size: int, num_blocks: int | None, kv_dtype: str = AUTO.name
    ) -> None:
        self.model = model
        self.cache = model.new_cache(max_sequences, block_size=block_size, num_blocks=num_blocks, kv_dtype=kv_dtype)

    @property
    def num_free_rows(self) -> int:
        """Requests that the cache can take beside those that it holds."""
        return self.cache.rows.num_free

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody holds, over all ranks as on the fullest; asking waits for the device."""
        parallel = self.model.parallel
        return parallel.size * parallel.least(self.cache.blocks.num_free)

    def reserve(self, batch: Batch) -> None:
        """Give the requests of a batch rows and what the cache reserves for its tokens.

        Raises:
            OutOfBlocks: the cache is full; requests without a row still have none.
        """
        new = [request for request in batch.requests if request.row is None]
        rows = iter(self.cache.add_sequences(len(new)))
        for request in new:
            request.row = next(rows)
        try:
            # All ranks read the same tokens, or none does.
            with self.model.parallel.together(OutOfBlocks, same=hash(tuple(_tokens(batch)))):
                self.cache.reserve(_rows(batch), batch.counts)
        except ValueError:
            for request in new:
                self.release(request)
            raise

    def run(self, batch: Batch) -> Tensor:
        """Read the tokens of a batch: float32 logits [B, V] after the last token of each request.

        Raises:
            OutOfBlocks: the cache got full on the way: what it holds of these requests is of no use any more.
        """
        hidden_TH = self.model.read(
            torch.tensor(_tokens(batch), device=self.model.device),
            batch.counts,
            self.cache,
            _rows(batch),
            ends_prompt=batch.reads_all,
        )
        start = 0
        for request, count in _parts(batch):
            if request.sampling.prompt_logprobs:
                self._keep_prompt_logprobs(request, hidden_TH[start : start + count])
            request.num_read += count
            start += count
        last_B = torch.tensor(batch.counts, device=hidden_TH.device).cumsum(0) - 1
        return self.model.logits(hidden_TH[last_B])

    def _keep_prompt_logprobs(self, request: Request, hidden_TH: Tensor) -> None:
        """Log-probabilities of the tokens of a prompt that follow those just read, as far as they are not known."""
        known = 1 + len(request.prompt_logprobs)
        targets = request.prompt[known : 1 + request.num_read + len(hidden_TH)]
        first = known - 1 - request.num_read
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        for start in range(0, len(targets), at_once):
            part = targets[start : start + at_once]
            logits_TV = self.model.logits(hidden_TH[first + start : first + start + len(part)])
            request.prompt_logprobs += token_logprobs(logits_TV, part, request.sampling.logprobs or 0)

    def fork(self, source: Request, samples: Sequence[Request]) -> None:
        """Let samples go on from where a request stands; the blocks are shared until somebody writes.

        Raises:
            OutOfBlocks: the cache has not enough rows or blocks; nothing was taken.
        """
        assert source.row is not None
        rows: list[int] = []
        try:
            with self.model.parallel.together(OutOfBlocks):
                rows = self.cache.fork(source.row, len(samples))
        except OutOfBlocks:
            self.cache.free_sequences(rows)
            raise
        for sample, row in zip(samples, rows, strict=True):
            sample.row, sample.num_read = row, source.num_read
            sample.prompt_logprobs = list(source.prompt_logprobs)

    def hand_over(self, kept: Request, request: Request) -> None:
        """Make the memory of one request another one's, whose prompt extends what it holds."""
        request.row, request.num_read = kept.row, kept.num_read
        kept.row, kept.num_read = None, 0

    def num_blocks(self, request: Request) -> int:
        """Blocks that hold a request, over all ranks as on the fullest."""
        parallel = self.model.parallel
        return parallel.size * parallel.most(sum(map(sum, self.usage(request).blocks)))

    def usage(self, request: Request) -> CacheUsage:
        """What the cache of this rank holds for a request."""
        assert request.row is not None
        return CacheUsage.of(self.cache, [request.row])

    def release(self, request: Request) -> None:
        """Take a request's memory back; what it had read is unread."""
        if request.row is not None:
            row, request.row, request.num_read = request.row, None, 0
            self.cache.free_sequences([row])


def _rows(batch: Batch) -> list[int]:
    return [request.row for request in batch.requests if request.row is not None]


def _tokens(batch: Batch) -> list[int]:
    return [token for request, count in _parts(batch) for token in request.unread[:count]]


def _parts(batch: Batch) -> list[tuple[Request, int]]:
    return list(zip(batch.requests, batch.counts, strict=True))

"""Runs a batch of requests through the model and the cache: rows, packed tokens, logits of the newest.

Legend: B requests of a batch, T their tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.request import Request
from megatron_dmc.inference.scheduler import Batch


class ModelRunner:
    """A model and the memory of its requests.

    Args:
        model: to decode with.
        max_sequences: requests in the cache at once.
        block_size: entries per block of the cache.
        num_blocks: blocks of the cache; None lets it grow.
    """

    def __init__(self, model: Decoder, max_sequences: int, block_size: int, num_blocks: int | None) -> None:
        self.model = model
        self.cache = model.new_cache(max_sequences, block_size=block_size, num_blocks=num_blocks)

    def reserve(self, batch: Batch) -> None:
        """Give the requests of a batch rows and the blocks that its tokens need at most.

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
        """Read the tokens of a batch: float32 logits [B, V] after the last token of each request."""
        hidden_TH = self.model.read(
            torch.tensor(_tokens(batch), device=self.model.device),
            batch.counts,
            self.cache,
            _rows(batch),
            ends_prompt=batch.reads_all,
        )
        for request, count in _parts(batch):
            request.num_read += count
        last_B = torch.tensor(batch.counts, device=hidden_TH.device).cumsum(0) - 1
        return self.model.logits(hidden_TH[last_B])

    def usage(self, request: Request) -> CacheUsage:
        """What the cache holds for a request."""
        assert request.row is not None
        return CacheUsage.of(self.cache, [request.row])

    def release(self, request: Request) -> None:
        """Take a request's memory back."""
        if request.row is not None:
            row, request.row = request.row, None
            self.cache.free_sequences([row])


def _rows(batch: Batch) -> list[int]:
    return [request.row for request in batch.requests if request.row is not None]


def _tokens(batch: Batch) -> list[int]:
    return [token for request, count in _parts(batch) for token in request.unread[:count]]


def _parts(batch: Batch) -> list[tuple[Request, int]]:
    return list(zip(batch.requests, batch.counts, strict=True))

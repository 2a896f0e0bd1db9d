"""Tensor parallelism of inference: ranks that hold one model together and run the same steps at the same time.

Every rank has its share of the heads, of the channels of the MLP and of the vocabulary, and the cache of its heads.
Head caches of different ranks have different lengths, so whatever a rank does because of them is agreed on first;
everything else (prompts, samples, the order of requests) is the same on all ranks by itself.

Legend: T new tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.methods.step import Ranks
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import Cut
from megatron_dmc.support.errors import InfrastructureError


class TensorParallel:
    """One of ``size`` ranks. Alone it needs no process group, and every operation is the identity.

    Args:
        size: ranks that hold the model.
        rank: which of them this is, from 0.
    """

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size, self.rank = size, rank
        self.ranks = Ranks(mean_over_heads=self._mean)
        """What methods may ask of other ranks."""

    @classmethod
    def join(cls, store: dist.Store, rank: int, size: int) -> TensorParallel:
        """Meet the other processes at a store. Tensors of a GPU travel by NCCL, others by gloo."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        return cls(size, rank)

    def check(self, config: ModelConfig) -> None:
        """Raises ``ValueError`` where the ranks cannot have equally many heads of a model."""
        if config.num_kv_heads % self.size:
            divisors = [n for n in range(1, config.num_kv_heads + 1) if config.num_kv_heads % n == 0]
            raise ValueError(
                f"{self.size} ranks cannot share {config.num_kv_heads} KV heads equally: start {_either(divisors)} "
                "with torchrun --nproc-per-node"
            )

    def share(self, config: ModelConfig) -> ModelConfig:
        """What a rank computes of a model, as a model of its own: fewer heads, channels and tokens."""
        return dataclasses.replace(
            config,
            num_attention_heads=config.num_attention_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            ffn_hidden_size=-(-config.ffn_hidden_size // self.size),
            vocab_size=-(-config.vocab_size // self.size),
        )

    def cut(self, axis: int, length: int) -> Cut:
        """This rank's part of an axis; where it does not divide, parts differ by one."""
        return Cut(axis, length * self.rank // self.size, length * (self.rank + 1) // self.size)

    def embedding(self, tokens: Tensor, weight: Tensor, vocab_size: int) -> Tensor:
        """[..., H] of tokens [...], from this rank's rows of the embedding."""
        if self.size == 1:
            return F.embedding(tokens, weight)
        place = tokens - self.cut(0, vocab_size).first
        is_here = (place >= 0) & (place < len(weight))
        return self.sum(F.embedding(torch.where(is_here, place, 0), weight) * is_here.unsqueeze(-1))

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        return x if self.size == 1 else self._reduce(x, dist.ReduceOp.SUM)

    def gather(self, x: Tensor, length: int) -> Tensor:
        """All parts of the last axis, which has ``length`` entries over all ranks (see :meth:`cut`)."""
        if self.size == 1:
            return x
        longest = -(-length // self.size)
        parts = self._gather(F.pad(x, (0, longest - x.shape[-1])))
        sizes = [length * (rank + 1) // self.size - length * rank // self.size for rank in range(self.size)]
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes, strict=True)], dim=-1)

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return -self.most(-number)

    def most(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return self._most([number])[0]

    def all_objects(self, x: Any) -> list[Any]:
        """What every rank gives, in their order: small objects of our own."""
        return [x] if self.size == 1 else self._gather_objects(x)

    @contextlib.contextmanager
    def together(self, kind: type[Exception], same: int = 0) -> Iterator[None]:
        """Where an error of this kind ends the block on one rank, it does on all.

        Args:
            kind: what may be raised on some ranks alone.
            same: a number that every rank must have come to, or they have diverged.
        """
        error = None
        try:
            yield
        except kind as raised:
            error = raised
        failed, largest, negated_smallest = self._most([int(error is not None), same, -same])
        assert largest == -negated_smallest, f"ranks have diverged: {same} here, {-negated_smallest} to {largest}"
        if failed:
            messages = self.all_objects(str(error or ""))
            raise error or kind(next(filter(None, messages), ""))

    def _mean(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else self.sum(x.clone()) / self.size

    def _most(self, numbers: list[int]) -> list[int]:
        return numbers if self.size == 1 else self._reduce(torch.tensor(numbers), dist.ReduceOp.MAX).tolist()

    def _reduce(self, x: Tensor, operation: Any) -> Tensor:
        with _lost_ranks():
            dist.all_reduce(x, operation)
        return x

    def _gather(self, x: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.size)]
        with _lost_ranks():
            dist.all_gather(parts, x.contiguous())
        return parts

    def _gather_objects(self, x: Any) -> list[Any]:
        objects = [None] * self.size
        with _lost_ranks():
            dist.all_gather_object(objects, x)
        return objects


ALONE = TensorParallel()


@contextlib.contextmanager
def _lost_ranks() -> Iterator[None]:
    """A rank that is gone fails the others where they wait for it."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).split(". ")[0]
        raise InfrastructureError(f"another rank has ended, torchrun says which and how ({reason})") from error


def _either(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last

"""How Megatron lays out what Hugging Face keeps apart: pure functions of tensors, each with its inverse.

Both sides use the half-split form of rotary embeddings, so no rows of q and k are permuted.
Dimensions: N query heads, G KV heads, D head_dim, h hidden_size, f ffn_hidden_size, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megatron_dmc.models.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

VOCAB_MULTIPLE = 128
"""Megatron's --make-vocab-size-divisible-by."""


@dataclass(frozen=True)
class MegatronShape:
    """A Llama as Megatron holds it: with a vocabulary padded for its kernels and its tensor parallelism."""

    config: ModelConfig
    padded_vocab_size: int


def padded_vocab_size(vocab_size: int, tensor_size: int = 1) -> int:
    """Rows that Megatron gives the embedding: the next multiple of 128 x tensor parallel size."""
    multiple = VOCAB_MULTIPLE * tensor_size
    return -(-vocab_size // multiple) * multiple


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, config: ModelConfig) -> Tensor:
    """q ``[N D, h]``, k and v ``[G D, h]`` -> ``[(N + 2 G) D, h]``: per KV head its queries, its key, its value.

    Biases, which have no axis of h, the same way.
    """
    by_group = [part.unflatten(0, (config.num_kv_heads, -1)) for part in (q, k, v)]
    return _concatenate(by_group, 1).flatten(0, 1)


def split_qkv(fused: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of :func:`fuse_qkv`."""
    by_group, head_dim = fused.unflatten(0, (config.num_kv_heads, -1)), config.head_dim
    sizes = (config.queries_per_kv_head * head_dim, head_dim, head_dim)
    q, k, v = (part.flatten(0, 1) for part in by_group.split(sizes, dim=1))
    return q, k, v


def pad_vocabulary(weight: Tensor, rows: int) -> Tensor:
    """``[V, h]`` -> ``[rows, h]`` with zeros behind the vocabulary."""
    if rows == weight.shape[0]:
        return weight
    padded = weight.new_zeros((rows, weight.shape[1]))
    padded[: weight.shape[0]] = weight
    return padded


class Cut(NamedTuple):
    """A part of a tensor: entries ``first .. last`` of one axis."""

    axis: int
    first: int
    last: int

    def of(self, tensor: Tensor) -> Tensor:
        """The part, in memory of its own."""
        return tensor.narrow(self.axis, self.first, self.last - self.first).clone()

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Of the part of a tensor of shape ``whole``."""
        return (*whole[: self.axis], self.last - self.first, *whole[self.axis + 1 :])


@dataclass(frozen=True)
class Layout:
    """How Hugging Face's tensors become one of Megatron's, and how tensor parallelism cuts both.

    ``fuse`` and ``split`` are inverse to each other on the real rows of the vocabulary, ``shard`` and ``unshard`` on
    every tensor whose cut ``axis`` divides by the number of shards. It is the same for Hugging Face's tensors and for
    Megatron's; None: every rank holds all of them.
    """

    fuse: Callable[[Sequence[Tensor], MegatronShape], Tensor]
    split: Callable[[Tensor, MegatronShape], tuple[Tensor, ...]]
    shard: Callable[[Tensor, int], list[Tensor]]
    unshard: Callable[[Sequence[Tensor]], Tensor]
    axis: int | None

    def shard_shape(self, shape: tuple[int, ...], count: int) -> tuple[int, ...]:
        """The shape of each of ``count`` shards of a tensor.

        Raises:
            ValueError: its axis does not divide.
        """
        if self.axis is None:
            return shape
        size, rest = divmod(shape[self.axis], count)
        if rest:
            raise ValueError(f"axis {self.axis} of {shape} cannot be cut into {count} equal shards")
        return (*shape[: self.axis], size, *shape[self.axis + 1 :])


def _fuse_qkv(parts: Sequence[Tensor], shape: MegatronShape) -> Tensor:
    q, k, v = parts
    return fuse_qkv(q, k, v, shape.config)


def _only(parts: Sequence[Tensor], shape: MegatronShape) -> Tensor:
    (part,) = parts
    return part


def _alone(fused: Tensor, shape: MegatronShape) -> tuple[Tensor, ...]:
    return (fused,)


def _copies(tensor: Tensor, count: int) -> list[Tensor]:
    return [tensor] * count


def _first_of_equal(shards: Sequence[Tensor]) -> Tensor:
    if any(not shards[0].equal(shard) for shard in shards[1:]):
        raise ValueError("the tensor ranks hold different copies of a tensor that they share")
    return shards[0]


def _cut(axis: int) -> Callable[[Tensor, int], list[Tensor]]:
    def cut(tensor: Tensor, count: int) -> list[Tensor]:
        return list(tensor.chunk(count, dim=axis))

    return cut


def _join(axis: int) -> Callable[[Sequence[Tensor]], Tensor]:
    def join(shards: Sequence[Tensor]) -> Tensor:
        return shards[0] if len(shards) == 1 else _concatenate(shards, axis)

    return join


def _shard_gate_up(fused: Tensor, count: int) -> list[Tensor]:
    """Each rank holds its rows of the gate, then its rows of the up projection."""
    gate, up = fused.chunk(2)
    return [_concatenate(pair) for pair in zip(gate.chunk(count), up.chunk(count), strict=True)]


def _unshard_gate_up(shards: Sequence[Tensor]) -> Tensor:
    halves = [shard.chunk(2) for shard in shards]
    return _concatenate([gate for gate, _ in halves] + [up for _, up in halves])


def _concatenate(tensors: Sequence[Tensor], axis: int = 0) -> Tensor:
    import torch  # not at the top: those who only describe checkpoints know the layouts and load no torch

    return torch.cat(list(tensors), dim=axis)


REPLICATED = Layout(_only, _alone, _copies, _first_of_equal, axis=None)
ROWS = Layout(_only, _alone, _cut(0), _join(0), axis=0)
COLUMNS = Layout(_only, _alone, _cut(1), _join(1), axis=1)
VOCABULARY = Layout(
    fuse=lambda parts, shape: pad_vocabulary(parts[0], shape.padded_vocab_size),
    split=lambda fused, shape: (fused[: shape.config.vocab_size],),
    shard=_cut(0),
    unshard=_join(0),
    axis=0,
)
QKV = Layout(
    fuse=_fuse_qkv,
    split=lambda fused, shape: split_qkv(fused, shape.config),
    shard=_cut(0),
    unshard=_join(0),
    axis=0,
)
GATE_UP = Layout(
    fuse=lambda parts, shape: _concatenate(parts),
    split=lambda fused, shape: fused.chunk(2),
    shard=_shard_gate_up,
    unshard=_unshard_gate_up,
    axis=0,
)

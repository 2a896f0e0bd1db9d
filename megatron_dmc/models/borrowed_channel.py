"""The channels that DMC borrows: the last one of every query head (importance) and key head (decision)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_dmc.models import fusion
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import Entry


def clear_borrowed_rows(entry: Entry, parts: Sequence[Tensor], config: ModelConfig) -> Sequence[Tensor]:
    """The tensors of an entry with the rows zeroed that produce borrowed channels of q and k.

    A plain Llama with these rows at zero computes what a DMC model computes without compression, because DMC
    ignores the channels in its attention. Tensors other than q and k are returned as they are.
    """
    if entry.mapping.layout is not fusion.QKV:
        return parts
    q, k, v = parts
    return (clear_rows(q, config.head_dim), clear_rows(k, config.head_dim), v)


def clear_rows(weight: Tensor, head_dim: int) -> Tensor:
    """A copy of ``[heads x D, ...]`` with the last row of every head at zero."""
    cleared = weight.clone()
    cleared[head_dim - 1 :: head_dim] = 0
    return cleared

"""The channels that DMC borrows: the last one of every query head (importance) and key head (decision).

Where they come from. Without ``qk_norm`` a channel is one row of the projection of q or k (where there is a bias, with
its element), and the model without it is the model with that row at zero. With ``qk_norm`` the head passes through
``w * x / rms(x)`` first, and decisions are read behind it. The model without the channel is then the one with the last
element of ``w`` at zero: the row itself must stay, because it is part of ``rms(x)``, which scales the other channels.

Where a retrofit starts. The channel must be zero and able to learn. The row at zero does both, with ``qk_norm`` too,
if ``w`` is not zero there: the gradient of each of the two factors contains the other one, so that with both at zero
neither would ever move, and with ``w`` alone at zero every head would wait for one shared scalar. So ``w`` becomes 1
there, the row 0; the other channels grow by what the row had in ``rms(x)``, about 1 / (2 D) of themselves.

Legend: N query heads, G KV heads, D head dim, h hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import Entry

if TYPE_CHECKING:
    from torch import Tensor


def borrowed_rows(weight: Tensor, head_dim: int) -> Tensor:
    """The rows of ``[heads x D, ...]`` that produce the borrowed channels: a view ``[heads, ...]`` into it."""
    return weight.unflatten(0, (-1, head_dim))[:, -1]


def borrowed_rows_of_qkv(fused: Tensor, queries_per_kv_head: int, head_dim: int) -> Tensor:
    """The same of Megatron's fused ``[(N + 2 G) D, ...]``: a view ``[G, N / G + 1, ...]``, keys last."""
    return fused.unflatten(0, (-1, queries_per_kv_head + 2, head_dim))[:, :-1, -1]


def without_borrowed_channels(role: str, weight: Tensor, config: ModelConfig) -> Tensor:
    """A tensor of the plain model that computes what a DMC model computes without compression.

    Args:
        role: of the tensor, see ``tensors``; those that do not produce borrowed channels are returned as they are.
        weight: as Hugging Face stores it.
    """
    if role not in (("q_norm", "k_norm") if config.qk_norm else ("q", "k", "q_bias", "k_bias")):
        return weight
    cleared = weight.clone()
    borrowed_rows(cleared, config.head_dim).zero_()
    return cleared


def parts_without_borrowed_channels(entry: Entry, parts: list[Tensor], config: ModelConfig) -> list[Tensor]:
    """:func:`without_borrowed_channels` of all Hugging Face tensors of an entry."""
    return [
        without_borrowed_channels(part.role, weight, config)
        for part, weight in zip(entry.row.parts, parts, strict=True)
    ]

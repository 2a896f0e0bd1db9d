"""The channels that methods borrow: the last one of some heads (``ops.borrowed`` says of which).

DMC reads importance from every query head and decisions from every key head, DMS decisions from the first query head of
each KV head, unless an adapter decides.

Where they come from. Without ``qk_norm`` a channel is one row of the projection of q or k, and the model without it
is the model with that row at zero. With ``qk_norm`` the head passes through ``w * x / rms(x)`` first, and decisions
are read behind it. The model without the channel is then the one with the last element of ``w`` at zero: the row
itself must stay, because it is part of ``rms(x)``, which scales the other channels.

Where a retrofit starts. The channel must be zero and able to learn. The row at zero does both, with ``qk_norm`` too,
if ``w`` is not zero there: the gradient of each of the two factors contains the other one, so that with both at zero
neither would ever move, and with ``w`` alone at zero every head would wait for one shared scalar. So ``w`` becomes 1
there, the row 0; the other channels grow by what the row had in ``rms(x)``, about 1 / (2 D) of themselves. In DMS heads
that lend nothing share ``w``, which therefore stays as it is, and no ``w`` makes the model without the channel.

Legend: N query heads, G KV heads, D head dim, h hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_dmc.config import DMS, DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import Entry
from megatron_dmc.ops.borrowed import EVERY_HEAD, FIRST_QUERY, NO_HEAD, Borrowed

if TYPE_CHECKING:
    from torch import Tensor


def borrowed_by(settings: DMCConfig | None) -> Borrowed:
    """The heads that lend a channel to a model; settings None: it was never retrofitted."""
    if settings is None or not settings.borrows_channel:
        return NO_HEAD
    return FIRST_QUERY if settings.method == DMS else EVERY_HEAD


def borrowed_rows(weight: Tensor, head_dim: int, heads_per_kv_head: int = 1, count: int | None = None) -> Tensor:
    """The rows of ``[heads x D, ...]`` that produce the last channels of heads: a view ``[G, heads, ...]`` into it.

    ``count``: of the heads of each KV head the first so many; None: all.
    """
    return weight.unflatten(0, (-1, heads_per_kv_head, head_dim))[:, :count, -1]


def borrowed_rows_of_qkv(
    fused: Tensor, queries_per_kv_head: int, head_dim: int, borrowed: Borrowed = EVERY_HEAD
) -> Tensor:
    """The same of Megatron's fused ``[(N + 2 G) D, ...]``, whose KV heads hold queries, key and value in this order."""
    count = queries_per_kv_head + 1 if borrowed.keys else borrowed.queries
    return borrowed_rows(fused, head_dim, queries_per_kv_head + 2, count)


def without_borrowed_channels(role: str, weight: Tensor, config: ModelConfig, borrowed: Borrowed) -> Tensor:
    """A tensor of the plain model that computes what a retrofitted model computes without compression.

    Args:
        role: of the tensor, see ``tensors``; those that do not produce borrowed channels are returned as they are.
        weight: as Hugging Face stores it.
        config: of the model.
        borrowed: the heads that lend a channel.

    Raises:
        ValueError: only some of the heads that share a norm lend one: no plain model computes the same.
    """
    if role not in (("q_norm", "k_norm") if config.qk_norm else ("q", "k")) or borrowed == NO_HEAD:
        return weight
    if config.qk_norm and borrowed.queries is not None:
        raise ValueError(
            f"some query heads of this {config.family} lend a channel behind a norm that all of them share: there is "
            "no plain model without it; export a stage that compresses, with its settings"
        )
    of_queries, is_shared = role.startswith("q"), config.qk_norm
    heads = config.queries_per_kv_head if of_queries and not is_shared else 1
    cleared = weight.clone()
    borrowed_rows(cleared, config.head_dim, heads, borrowed.queries if of_queries else int(borrowed.keys)).zero_()
    return cleared


def parts_without_borrowed_channels(
    entry: Entry, parts: list[Tensor], config: ModelConfig, borrowed: Borrowed
) -> list[Tensor]:
    """:func:`without_borrowed_channels` of all Hugging Face tensors of an entry."""
    return [
        without_borrowed_channels(part.role, weight, config, borrowed)
        for part, weight in zip(entry.row.parts, parts, strict=True)
    ]

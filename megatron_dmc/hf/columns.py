"""Which columns of a batch hold tokens: what ``attention_mask`` and ``position_ids`` may say beside a compressed cache.

transformers hides padding behind a mask in every pass. A compressed cache never holds padding, and what it has merged
or evicted cannot be hidden later. So a mask must show what was read, and positions must count tokens.

Legend: S columns of a pass, C columns with those read before, B batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shown_columns(
    hidden_BSH: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    num_read: Sequence[int],
    columns_read: int,
) -> Tensor:
    """bool [B, S]: which columns of a pass hold tokens.

    Args:
        hidden_BSH: the columns of the pass.
        attention_mask: [B, C]; None shows them all.
        position_ids: [1 or B, S].
        num_read: tokens of each row in the cache.
        columns_read: columns that the cache has seen, padding included.

    Raises:
        ValueError: no column at all, another shape, a mask that shows more or less than was read, other positions.
    """
    batch, length = hidden_BSH.shape[:2]
    if not length:
        raise ValueError(
            "no new tokens were given: generate() takes the whole text or, with an attention_mask over all of it, the "
            "new tokens alone"
        )
    shown_BS = torch.ones(batch, length, dtype=torch.bool, device=hidden_BSH.device)
    if attention_mask is not None:
        shown_BC = _checked_mask(attention_mask, (batch, columns_read + length), num_read, columns_read)
        if position_ids is None and _has_gap(shown_BC):
            raise ValueError(
                "attention_mask has padding between tokens of a row: give position_ids that count the tokens, or pad "
                "before or after them"
            )
        shown_BS = shown_BC[:, columns_read:]
    if position_ids is not None:
        _check_positions(position_ids, shown_BS, num_read)
    return shown_BS


def _checked_mask(mask: Tensor, shape: tuple[int, int], num_read: Sequence[int], columns_read: int) -> Tensor:
    if tuple(mask.shape) != shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}: must be {shape}, with a column for every token so far"
        )
    shown_BC = mask.bool()
    for row, (shown, read) in enumerate(zip(shown_BC[:, :columns_read].sum(dim=1).tolist(), num_read, strict=True)):
        if shown != read:
            raise ValueError(
                f"attention_mask shows {shown} earlier tokens in row {row}, the cache has read {read}: what it has "
                "merged or evicted cannot be hidden; use a new cache"
            )
    return shown_BC


def _has_gap(shown_BC: Tensor) -> bool:
    """Whether padding stands between tokens of some row."""
    num_before_BC = shown_BC.cumsum(dim=1)
    inside_BC = (num_before_BC > 0) & (num_before_BC < num_before_BC[:, -1:])
    return bool((inside_BC & ~shown_BC).any())


def _check_positions(position_ids: Tensor, shown_BS: Tensor, num_read: Sequence[int]) -> None:
    num_read_B1 = torch.tensor(num_read, device=shown_BS.device).unsqueeze(-1)
    position_BS = num_read_B1 + shown_BS.cumsum(dim=1) - 1
    fits = position_ids.ndim == 2 and position_ids.shape[0] in (1, len(shown_BS))
    if not fits or position_ids.shape[1] != shown_BS.shape[1]:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}: must be {tuple(shown_BS.shape)}, or left out"
        )
    if not torch.equal(position_ids.expand_as(position_BS)[shown_BS], position_BS[shown_BS]):
        raise ValueError(
            "position_ids must count the tokens of each row, on from those in the cache: leave them out, or use a new "
            "cache for a text that begins anew"
        )

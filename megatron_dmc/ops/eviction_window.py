"""The tokens of every head that leave a window next: where their entries lie, and which of them are marked.

A ring holds the window's W tokens and the one that is about to leave it. A token comes at the position of the one that
left W + 1 positions before it, finds in its slot what became of that one, and takes over its place if it was marked. So
a head keeps one int32 for every token of the window, and nothing for those behind it, which stay for good.

Legend: B sequences, G KV heads, R = W + 1 slots of the ring, E entries, T packed new tokens. A slot holds the place of
the entry of a token that is marked, or the complement (``~place``, which is negative) of one that is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ALL = torch.iinfo(torch.int32).max
"""Stands for any number of queries."""


class Part(NamedTuple):
    """Several new tokens of some sequences, packed one sequence behind the other."""

    position_B: Tensor
    """int64: tokens that came before."""
    count_B: Tensor
    """int64: new tokens."""
    sequence_T: Tensor
    """int64: the sequence of each token."""
    offset_T: Tensor
    """int64: its place among those of its sequence."""
    last_B: Tensor
    """int64: the last token of each sequence."""


def mark_newest(ring_BGR: Tensor, marked_BG: Tensor, position_B: Tensor) -> Tensor:
    """The ring after the token at ``position_B`` has decided about the one before it, which was open until then."""
    slot_BG1 = _slot(position_B - 1, ring_BGR)
    found_BG1 = ring_BGR.gather(-1, slot_BG1)
    return ring_BGR.scatter(-1, slot_BG1, torch.where(marked_BG.unsqueeze(-1), ~found_BG1, found_BG1))


def take_place(ring_BGR: Tensor, marked_BG: Tensor, length_BG: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
    """The place of one new token in every head cache, int32 [B, G], and the ring with it.

    Args:
        ring_BGR: of the tokens before; any values where there are none.
        marked_BG: whether the new token is marked already.
        length_BG: int32 entries of each head cache.
        position_B: int64 position of the token.
    """
    slot_BG1 = _slot(position_B, ring_BGR)
    found_BG = ring_BGR.gather(-1, slot_BG1).squeeze(-1)
    leaves_BG = (found_BG >= 0) & (position_B >= ring_BGR.shape[-1]).unsqueeze(-1)
    place_BG = torch.where(leaves_BG, found_BG, length_BG)
    return place_BG, ring_BGR.scatter(-1, slot_BG1, _encoded(place_BG, marked_BG).unsqueeze(-1))


def num_queries(ring_BGR: Tensor, part: Part, num_entries: int) -> Tensor:
    """int32 [B, G, E]: how many of the new tokens see each entry that was there before them (``ALL``: every one)."""
    token_BR = _newest_tokens(part.position_B, ring_BGR)
    left_BGR = (token_BR + ring_BGR.shape[-1] - part.position_B.unsqueeze(-1)).unsqueeze(1).expand_as(ring_BGR)
    counts = (ring_BGR >= 0) & (token_BR >= 0).unsqueeze(1)
    seen_BGE = torch.full((*ring_BGR.shape[:2], num_entries + 1), ALL, dtype=torch.int32, device=ring_BGR.device)
    # What does not count goes behind the last entry.
    seen_BGE.scatter_(-1, torch.where(counts, ring_BGR, num_entries).long(), left_BGR.int())
    return seen_BGE[..., :-1]


def take_places(ring_BGR: Tensor, marked_TG: Tensor, length_BG: Tensor, part: Part) -> tuple[Tensor, Tensor]:
    """As :func:`take_place`, of many tokens that all append; -1 where a token is evicted by the end of the part.

    Returns:
        int32 [T, G] places, and the ring [B, G, R] after the last token of each sequence.
    """
    left_T = part.offset_T < part.count_B[part.sequence_T] - ring_BGR.shape[-1]
    stays_TG = ~(marked_TG & left_T.unsqueeze(-1))
    stayed_TG = stays_TG.cumsum(0)
    start_B = part.last_B - part.count_B + 1
    before_BG = (stayed_TG - stays_TG.int())[start_B]
    place_TG = ((length_BG - before_BG)[part.sequence_T] + stayed_TG - 1).int()
    token_BR = _newest_tokens(part.position_B + part.count_B, ring_BGR)
    offset_BR = token_BR - part.position_B.unsqueeze(-1)
    new_BRG = _encoded(place_TG, marked_TG)[(start_B.unsqueeze(-1) + offset_BR).clamp(min=0)]
    ring_BGR = torch.where((offset_BR >= 0).unsqueeze(1), new_BRG.transpose(1, 2), ring_BGR)
    return torch.where(stays_TG, place_TG, -1), ring_BGR


def move_places(ring_BGR: Tensor, place_BGE: Tensor) -> Tensor:
    """The ring after the entry at place e has moved to ``place_BGE[..., e]``."""
    marked_BGR = ring_BGR >= 0
    old_BGR = torch.where(marked_BGR, ring_BGR, ~ring_BGR).long().clamp(max=place_BGE.shape[-1] - 1)
    return _encoded(place_BGE.gather(-1, old_BGR), marked_BGR)


def _encoded(place: Tensor, marked: Tensor) -> Tensor:
    return torch.where(marked, place, ~place).int()


def _slot(position_B: Tensor, ring_BGR: Tensor) -> Tensor:
    """int64 [B, G, 1]: the slot of the tokens at a position."""
    return (position_B % ring_BGR.shape[-1]).view(-1, 1, 1).expand(*ring_BGR.shape[:2], 1)


def _newest_tokens(num_tokens_B: Tensor, ring_BGR: Tensor) -> Tensor:
    """int64 [B, R]: position of the token in each slot after so many tokens; negative in a slot without one."""
    newest_B1, num_slots = num_tokens_B.unsqueeze(-1) - 1, ring_BGR.shape[-1]
    slot_R = torch.arange(num_slots, device=ring_BGR.device)
    return newest_B1 - (newest_B1 - slot_R) % num_slots

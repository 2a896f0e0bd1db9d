"""What split attention has to do, laid out on the device: the chunks of all head caches, longest head caches first.

Head caches differ in length, so one program per head cache would leave most of a GPU waiting for the longest. Each is
cut into chunks of at most ``chunk_size`` entries, whose number and borders follow from its own length alone: what a
sequence gets does not depend on what else is in its batch. Nothing here asks the host for a length.

Legend: L layers, B sequences, A rows of the cache, G KV heads, H head caches of a layer (b G + g).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_SIZE = 256
"""Entries; 128 KiB of keys and values with 128 channels of 16 bits, several times what the start of a chunk costs."""
CHUNK_MULTIPLE = 16
"""Entries; chunks begin at multiples of it."""


class WorkList(NamedTuple):
    """Chunks of the head caches of one layer; all layers at once in :func:`work_list`."""

    order_H: Tensor
    """int32 head caches, longest first."""
    start_H: Tensor
    """int32, one longer than there are head caches: chunks before each of them in that order; last, all of them."""
    chunk_size: int

    def of_layer(self, layer: int) -> WorkList:
        """That of one layer, from one of several."""
        return self._replace(order_H=self.order_H[layer], start_H=self.start_H[layer])

    def max_chunks(self, longest: int) -> int:
        """More chunks than there can be while no head cache has more than ``longest`` entries."""
        # One more each: the list may have been made for one entry more than there is.
        return self.order_H.shape[-1] * (num_chunks(longest, self.chunk_size) + 1)


def work_list(length_BG: Tensor, chunk_size: int = CHUNK_SIZE) -> WorkList:
    """The work list of head caches of ``length_BG`` entries, int32 [B, G], or of all layers at once [L, B, G].

    Lengths may be too large, at the cost of chunks in which there is nothing to do: one list for all layers is made
    before a step from the lengths so far plus 1. 0 stands for a sequence that is not there.
    """
    assert chunk_size % CHUNK_MULTIPLE == 0, f"chunk_size {chunk_size} is no multiple of {CHUNK_MULTIPLE} entries"
    longest_first, order = length_BG.flatten(-2).sort(dim=-1, descending=True, stable=True)
    end = num_chunks(longest_first, chunk_size).cumsum(-1, dtype=torch.int32)
    start = torch.cat((torch.zeros_like(end[..., :1]), end), dim=-1)
    return WorkList(order.to(torch.int32), start, chunk_size)


def num_chunks[Length: (int, Tensor)](length: Length, chunk_size: int) -> Length:
    """Chunks of a head cache: as few as can be."""
    return (length + chunk_size - 1) // chunk_size


def lengths_of_rows(cache_seqlens_AG: Tensor, rows_B: Tensor) -> Tensor:
    """Lengths [..., B, G] of the sequences in some of the rows [..., A, G]; 0 for row -1, which is no sequence."""
    lengths_BG = cache_seqlens_AG[..., rows_B.clamp(min=0), :]
    return lengths_BG.masked_fill((rows_B < 0).unsqueeze(-1), 0)

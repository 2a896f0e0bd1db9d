"""The books of the pool, on the device of the cache: how many head caches hold each block. Nothing is read back.

A block is free while nobody holds it, and shared while several do. Every layer takes the first free blocks from a
place of its own, its home, so that the blocks of a layer lie close together: on a CPU its attention reads that part of
the pool as it lies there. A layer whose home is full goes on behind it.

Legend: L layers, X blocks of the pool, W places in tables where a block may be wanted.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Blocks:
    """Hands out the numbers 0 .. total - 1.

    Args:
        total: how many blocks there are.
        num_layers: of the model.
        device: of the books.

    Attributes:
        holders_X: int32 head caches that hold each block.
    """

    def __init__(self, total: int, num_layers: int, device: torch.device | str = "cpu") -> None:
        self.total = total
        self.holders_X = torch.zeros(total, dtype=torch.int32, device=device)
        self._home_L = torch.arange(num_layers, device=device) * total // num_layers

    def extend(self, count: int) -> None:
        """Add free blocks behind the others."""
        self.holders_X = F.pad(self.holders_X, (0, count))
        self._home_L = self._home_L * (self.total + count) // self.total
        self.total += count

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; reads one integer back."""
        return int(self.count_free())

    @property
    def num_in_use(self) -> int:
        """Blocks that somebody holds; reads one integer back."""
        return self.total - self.num_free

    def count_free(self) -> Tensor:
        """How many nobody holds, int64 on the device."""
        return (self.holders_X == 0).sum()

    def take(self, is_wanted_LW: Tensor, layers: slice = slice(None)) -> Tensor:
        """A free block for every place where one is wanted; the caller knows that there are enough.

        Args:
            is_wanted_LW: bool, rows are ``layers``.
            layers: whose blocks they are.

        Returns:
            int64 [L, W] blocks, any number where none is wanted.
        """
        is_free_X = self.holders_X == 0
        rank_X = is_free_X.cumsum(0, dtype=torch.int32)
        rank_LW = is_wanted_LW.flatten().cumsum(0, dtype=torch.int32).view(is_wanted_LW.shape)
        before_L = rank_LW[:, -1] - is_wanted_LW.sum(1, dtype=torch.int32)
        home_L = self._home_L[layers]
        # A layer starts at its home, yet behind what the layers before it take, and so that the others still fit.
        start_L = (rank_X[home_L] - is_free_X[home_L].int() - before_L).cummax(0).values
        start_L = torch.minimum(start_L, rank_X[-1] - rank_LW[-1, -1])
        block_LW = torch.searchsorted(rank_X, rank_LW + start_L.unsqueeze(-1))
        self.hold(block_LW, is_wanted_LW)
        return block_LW

    def hold(self, blocks: Tensor, times: Tensor) -> None:
        """Let ``times`` (bool or int) more head caches hold each of ``blocks``; the two broadcast."""
        blocks, times = torch.broadcast_tensors(blocks, times)
        self.holders_X.index_add_(0, blocks.flatten().long(), times.flatten().int())

    def release(self, blocks: Tensor, is_given_back: Tensor) -> None:
        """Let one head cache less hold each of ``blocks`` where ``is_given_back``."""
        self.hold(blocks, -is_given_back.int())

    def check_integrity(self, held: Tensor) -> None:
        """Compare the books with the blocks that stand in tables, each as often as it does.

        The message of the ``AssertionError`` is the equation that does not hold.
        """
        in_tables_X = held.long().bincount(minlength=self.total)
        wrong = (in_tables_X != self.holders_X).nonzero().flatten()
        block = int(wrong[0]) if len(wrong) else 0
        holders, tables = int(self.holders_X[block]), int(in_tables_X[block])
        assert not len(wrong), f"block {block}: holders {holders} != places in tables {tables}"

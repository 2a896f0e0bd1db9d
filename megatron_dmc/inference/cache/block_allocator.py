"""Blocks of the cache as numbers: who holds which is known here, what they contain is not. No torch."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(ValueError):
    """The pool has fewer free blocks than are needed. Nothing was allocated."""


class BlockAllocator:
    """Hands out block numbers 0 .. num_blocks - 1; each is free or in use, never both.

    Args:
        num_blocks: blocks in the pool.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(reversed(range(num_blocks)))
        self._in_use: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Blocks that are allocated."""
        return len(self._in_use)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks.

        Raises:
            OutOfBlocks: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} blocks needed, {len(self._free)} of {self.num_blocks} free")
        blocks = [self._free.pop() for _ in range(count)]
        self._in_use.update(blocks)
        return blocks

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back. A block that is not in use is a fault of the caller."""
        blocks = list(blocks)
        once = set(blocks)
        assert len(once) == len(blocks), f"released twice: {blocks}"
        assert once <= self._in_use, f"not in use: {sorted(once - self._in_use)}"
        self._in_use.difference_update(blocks)
        self._free.extend(blocks)

    def extend(self, count: int) -> None:
        """Add ``count`` free blocks to the pool."""
        self._free.extend(reversed(range(self.num_blocks, self.num_blocks + count)))
        self.num_blocks += count

    def check_integrity(self) -> None:
        """Compare the books. The message of the ``AssertionError`` is the equation that does not hold."""
        free, in_use = set(self._free), self._in_use
        assert len(free) == len(self._free), f"distinct free {len(free)} != free {len(self._free)}"
        assert not free & in_use, f"free and in use at once: {sorted(free & in_use)} != []"
        equation = f"free {len(free)} + in use {len(in_use)} != blocks {self.num_blocks}"
        assert len(free) + len(in_use) == self.num_blocks, equation

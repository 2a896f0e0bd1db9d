"""Rows of the cache as numbers: which are free is known here, what they contain is not. No torch."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(ValueError):
    """Fewer are free than are needed. Nothing was allocated."""


class Allocator:
    """Hands out the numbers 0 .. total - 1; each is free or in use, never both.

    Args:
        total: how many there are.
        what: what they number, for messages.
    """

    def __init__(self, total: int, what: str = "rows") -> None:
        self.total = total
        self.what = what
        self._free = list(reversed(range(total)))
        self._in_use: set[int] = set()

    @property
    def num_free(self) -> int:
        """Numbers that can be allocated."""
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Numbers that are allocated."""
        return len(self._in_use)

    def is_in_use(self, number: int) -> bool:
        """Whether a number is allocated."""
        return number in self._in_use

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` of them.

        Raises:
            OutOfBlocks: fewer are free.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} {self.what} needed, {len(self._free)} of {self.total} free")
        taken = [self._free.pop() for _ in range(count)]
        self._in_use.update(taken)
        return taken

    def release(self, numbers: Iterable[int]) -> None:
        """Give numbers back. One that is not in use is a fault of the caller, and nothing is given back."""
        numbers = list(numbers)
        once = set(numbers)
        assert len(once) == len(numbers), f"{self.what} released twice: {numbers}"
        assert once <= self._in_use, f"{self.what} not in use: {sorted(once - self._in_use)}"
        self._in_use.difference_update(numbers)
        self._free.extend(numbers)

    def check_integrity(self) -> None:
        """Compare the books. The message of the ``AssertionError`` is the equation that does not hold."""
        free, in_use = set(self._free), self._in_use
        assert len(free) == len(self._free), f"distinct free {len(free)} != free {len(self._free)}"
        assert not free & in_use, f"free and in use at once: {sorted(free & in_use)} != []"
        equation = f"free {len(free)} + in use {len(in_use)} != {self.what} {self.total}"
        assert len(free) + len(in_use) == self.total, equation

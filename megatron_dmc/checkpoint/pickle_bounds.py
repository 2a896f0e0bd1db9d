"""What a pickle may cost: how deep and how large its values are, what serves as a key, what calls may copy.

A few hundred bytes can describe a value whose hash, comparison or printed form takes longer than the universe has
(tuples of the same tuple twice, a hundred times), or overflows the stack. No checkpoint holds such a value.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

from megatron_dmc.support.errors import Refused

DEPTH_LIMIT = 100
"""Containers in containers; saved arguments and optimizer states have about ten."""

_REPEATS_LIMIT = 64
"""How many times larger than the pickle the tree of its values may be: shared parts count as often as they appear."""
_SMALL = 1 << 16
_KEY_SCALARS = (str, int, float, bool, bytes, type(None))
_KEY_BITS_LIMIT = 63
"""Larger numbers can be chosen so that all of them share a place in the table."""


class Budget:
    """What calls may copy: a pickle that hands the same long text to a thousand calls would fill the memory."""

    def __init__(self, pickle_bytes: int) -> None:
        self._left = 4 * pickle_bytes + _SMALL

    def charge(self, value: Any) -> None:
        """Count what a call receives."""
        pending = [value]
        while pending:
            value = pending.pop()
            if isinstance(value, (tuple, list, set, frozenset, dict, str, bytes)):
                self._left -= len(value)
            if self._left < 0:
                raise Refused("its calls copy more than the pickle holds")
            if type(value) is tuple:
                pending += value


def check_key(key: Any, is_record: bool) -> None:
    """A key of a mapping or member of a set is a number, a text, bytes, a tuple of such, or a checked record."""
    members = key if type(key) is tuple else (key,)
    for member in () if is_record else members:
        if type(member) not in _KEY_SCALARS or (type(member) is int and member.bit_length() > _KEY_BITS_LIMIT):
            raise Refused(f"a {type(member).__name__} serves as a key")


def check_size(root: Any, pickle_bytes: int) -> None:
    """Refuse values that contain themselves, lie too deep, or repeat their parts beyond measure."""
    limit = _REPEATS_LIMIT * pickle_bytes + _SMALL
    measured: dict[int, tuple[int, int]] = {}  # size as a tree, depth
    entered: set[int] = set()
    pending = [(root, False)]
    while pending:
        value, is_left = pending.pop()
        children = _children(value)
        if children is None or id(value) in measured:
            continue
        if is_left:
            measured[id(value)] = size, depth = _measure(children, measured)
            entered.discard(id(value))
            if size > limit or depth > DEPTH_LIMIT:
                raise Refused("its values repeat or nest beyond measure")
        elif id(value) in entered:
            raise Refused("a value contains itself")
        else:
            entered.add(id(value))
            pending.append((value, True))
            pending += [(child, False) for child in children]


def _measure(children: list[Any], measured: dict[int, tuple[int, int]]) -> tuple[int, int]:
    sizes = [measured.get(id(child), (1, 0)) for child in children]
    return 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)


def _children(value: Any) -> list[Any] | None:
    """What a container or a record holds; None: it is neither."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values(), getattr(value, "state", None)]
    if isinstance(value, (tuple, list, set, frozenset)):
        return list(value)
    parts = getattr(value, "parts", None)
    return None if parts is None else list(parts)


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Python's garbage collector would look through all values again and again while they are built."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

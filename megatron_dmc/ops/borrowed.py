"""Which heads lend their last channel to decisions, among the query heads of a KV head and its key head.

And what an adapter is scaled by, which decides where none does.
"""

from __future__ import annotations

from typing import NamedTuple


class Borrowed(NamedTuple):
    """The heads that lend a channel; the same for every KV head."""

    queries: int | None
    """The first so many of its query heads; None: all of them."""
    keys: bool
    """The key head as well."""


EVERY_HEAD = Borrowed(None, True)
"""DMC: queries carry importance, keys carry decisions."""
FIRST_QUERY = Borrowed(1, False)
"""DMS without an adapter."""
NO_HEAD = Borrowed(0, False)
"""DMS with an adapter, and whatever decides nothing."""

ADAPTER_SCALE = 100.0
"""Factor of an adapter's output (code of [DMS]): its weights start at zero and move little at a small learning rate."""

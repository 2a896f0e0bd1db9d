"""Causal attention cut into pieces that stock kernels compute: rectangles and triangles of (query, key) pairs.

Every visible pair lies in exactly one piece, so that merging the pieces by log-sum-exp gives the whole softmax.
Pairs are free (near: no bias) or biased (far: the bias of the key is added). A pair (i, j) of one document is near
if i - j <= free_window, far if i - j > free_window.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ALL_FREE = None
"""Free window of plain causal attention: no key is ever biased."""


class Shape(enum.Enum):
    """Which pairs of a piece are visible; u, t count queries and keys from the corner of the piece."""

    FULL = "all pairs"
    LOWER = "t <= u: causal"
    UPPER = "t >= u"


@dataclass(frozen=True)
class Piece:
    """Queries [query, query + num_queries) see keys [key, key + num_keys) of the batch rows ``rows``.

    ``query`` counts rows of the query tensor (local under context parallelism), ``key`` positions in the sequence.
    Triangles are square. ``biased``: the key bias is added.
    """

    rows: slice
    query: int
    num_queries: int
    key: int
    num_keys: int
    shape: Shape
    biased: bool

    @property
    def queries(self) -> slice:
        """Rows of the query tensor."""
        return slice(self.query, self.query + self.num_queries)

    @property
    def keys(self) -> slice:
        """Positions of the keys."""
        return slice(self.key, self.key + self.num_keys)


def cut(
    length: int,
    chunk_length: int,
    query_starts: Sequence[int],
    documents: Sequence[Sequence[int]],
    free_window: int | None,
) -> list[Piece]:
    """Pieces of causal attention over ``length`` keys.

    Args:
        length: length S of the sequence.
        chunk_length: length of each chunk of queries.
        query_starts: position in the sequence at which each chunk of queries starts.
        documents: ascending start positions of the documents of each batch row.
        free_window: keys at most that many positions back are free; the query's own position always is. With 0 the
            own position is left out: the caller adds it. None: all keys are free.
    """
    pieces: list[Piece] = []
    for rows, starts in _equal_rows(documents):
        for chunk, first in enumerate(query_starts):
            for start, end in itertools.pairwise([*starts, length]):
                begin, stop = max(first, start), min(first + chunk_length, end)
                if begin < stop:
                    cutter = _Cutter(rows, chunk * chunk_length - first, start)
                    pieces += cutter.segment(begin, stop, free_window)
    return pieces


def _equal_rows(documents: Sequence[Sequence[int]]) -> Iterator[tuple[slice, list[int]]]:
    """Neighbouring batch rows with the same documents, to be computed together."""
    row = 0
    while row < len(documents):
        end = row + 1
        while end < len(documents) and list(documents[end]) == list(documents[row]):
            end += 1
        yield slice(row, end), list(documents[row])
        row = end


@dataclass(frozen=True)
class _Cutter:
    """Makes pieces of one document. ``shift`` leads from a position to a row of the query tensor."""

    rows: slice
    shift: int
    start: int

    def segment(self, begin: int, stop: int, free_window: int | None) -> Iterator[Piece]:
        """All pieces of the queries at positions [begin, stop)."""
        if free_window is ALL_FREE:
            yield from self._piece((begin, stop), (self.start, begin), Shape.FULL, False)
            yield from self._piece((begin, stop), (begin, stop), Shape.LOWER, False)
            return
        for block in range(begin, stop, free_window + 1) if free_window else ():
            yield from self._near_block(block, min(block + free_window + 1, stop), free_window)
        # Far: the keys before i - free_window, a triangle that starts at the first key which is not past for all.
        corner = max(begin - free_window, self.start)
        yield from self._piece((begin, stop), (self.start, corner), Shape.FULL, True)
        yield from self._piece((corner + free_window + 1, stop), (corner, stop - free_window - 1), Shape.LOWER, True)

    def _near_block(self, begin: int, stop: int, free_window: int) -> Iterator[Piece]:
        """Near keys of at most free_window + 1 queries: their own triangle, and the opposite one before it.

        Query begin + u sees the keys begin - free_window + t with t >= u. Those before the document are cut off.
        """
        yield from self._piece((begin, stop), (begin, stop), Shape.LOWER, False)
        oldest = begin - free_window
        first_key = max(oldest, self.start)
        last_query = stop - 1
        diagonal = oldest + last_query - begin  # from this key on, all queries of the block see the keys
        yield from self._piece((begin, stop), (max(diagonal, first_key), begin), Shape.FULL, False)
        corner = begin + first_key - oldest
        yield from self._piece((begin, min(corner, last_query)), (first_key, diagonal), Shape.FULL, False)
        yield from self._piece((corner, last_query), (first_key, diagonal), Shape.UPPER, False)

    def _piece(self, queries: tuple[int, int], keys: tuple[int, int], shape: Shape, biased: bool) -> Iterator[Piece]:
        num_queries, num_keys = queries[1] - queries[0], keys[1] - keys[0]
        if num_queries > 0 and num_keys > 0:
            yield Piece(self.rows, queries[0] + self.shift, num_queries, keys[0], num_keys, shape, biased)

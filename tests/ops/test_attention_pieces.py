"""Cutting causal attention: every visible pair in exactly one piece, and biased where it should be."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.ops.masked_attention.pieces import Piece, Shape, cut


def pairs(piece: Piece) -> set[tuple[int, int]]:
    """(row of the query tensor, key position) of all visible pairs."""
    assert piece.shape is Shape.FULL or piece.num_queries == piece.num_keys
    visible = {Shape.FULL: lambda u, t: True, Shape.LOWER: lambda u, t: t <= u, Shape.UPPER: lambda u, t: t >= u}
    return {
        (piece.query + u, piece.key + t)
        for u in range(piece.num_queries)
        for t in range(piece.num_keys)
        if visible[piece.shape](u, t)
    }


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, int, list[int], list[list[int]]]:
    chunk_length = draw(st.integers(1, 8))
    num_places = draw(st.integers(1, 4))
    length = chunk_length * num_places
    places = draw(st.lists(st.integers(0, num_places - 1), min_size=1, max_size=num_places, unique=True))
    borders = st.sets(st.integers(1, length - 1), max_size=4) if length > 1 else st.just(set())
    documents = [[0, *sorted(draw(borders))] for _ in range(draw(st.integers(1, 2)))]
    return length, chunk_length, [place * chunk_length for place in places], documents


@given(geometries(), st.sampled_from([None, 0, 1, 2, 3, 7, 40]))
@settings(max_examples=300, deadline=None)
def test_pieces_are_a_partition(geometry: tuple[int, int, list[int], list[list[int]]], window: int | None) -> None:
    length, chunk_length, query_starts, documents = geometry
    pieces = cut(length, chunk_length, query_starts, documents, window)
    for row, starts in enumerate(documents):
        covered: dict[tuple[int, int], bool] = {}
        for piece in pieces:
            if row in range(*piece.rows.indices(len(documents))):
                for pair in pairs(piece):
                    assert pair not in covered
                    covered[pair] = piece.biased
        for chunk, first in enumerate(query_starts):
            for i in range(first, first + chunk_length):
                document = max(start for start in starts if start <= i)
                last = i if window != 0 else i - 1  # the caller adds the own position
                expected = {j: window is not None and i - j > window for j in range(document, last + 1)}
                query = chunk * chunk_length + i - first
                assert {j: biased for (q, j), biased in covered.items() if q == query} == expected

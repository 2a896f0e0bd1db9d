"""Where the queries and keys of a pass stand: positions, chunks of a context-parallel rank, documents.

Made once per pass and shared by all its layers, together with everything that follows from it alone.

Legend: S keys of the sequence, T queries, B batch, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.rope import Rotation, cos_sin, faded_rotation


@dataclass(frozen=True, eq=False)
class Geometry:
    """One pass over a batch of sequences, each key at one position.

    Args:
        length: keys S of the whole sequence.
        batch: rows B.
        inverse_frequencies: of the rotary angles, float32 [D/2]; None where nothing is rotated.
        query_starts: positions at which the equally long chunks of the queries start, ascending or not (context
            parallelism). None: the queries are the whole sequence.
        num_queries: queries T over all chunks; None: S.
        documents: for each row the ascending start positions of its documents, the first 0; no segment and no
            attention crosses a border. None: one document per row.
        position_S: int64 position of each key for RoPE; None counts from 0.

    Raises:
        ValueError: chunks outside the sequence, or documents that do not fit it.
    """

    length: int
    batch: int
    inverse_frequencies: Tensor | None = None
    query_starts: Sequence[int] | None = None
    num_queries: int | None = None
    documents: Sequence[Sequence[int]] | None = None
    position_S: Tensor | None = None
    _made: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_chunks(self.query_count, self.length, self.chunk_starts)
        if self.documents is not None:
            _check_documents(self.documents, self.batch, self.length)

    @property
    def query_count(self) -> int:
        """Queries T."""
        return self.length if self.num_queries is None else self.num_queries

    @property
    def chunk_starts(self) -> Sequence[int]:
        """Position at which each chunk of queries starts."""
        return [0] if self.query_starts is None else self.query_starts

    @property
    def chunk_length(self) -> int:
        """Queries in a chunk."""
        return self.query_count // len(self.chunk_starts)

    @property
    def device(self) -> torch.device:
        """Of the tensors made here."""
        return torch.device("cpu") if self.inverse_frequencies is None else self.inverse_frequencies.device

    @cached_property
    def query_T(self) -> Tensor:
        """int64: the place of each query in the sequence."""
        steps = torch.arange(self.chunk_length, device=self.device)
        return torch.cat([steps + start for start in self.chunk_starts])

    @cached_property
    def first_SB(self) -> Tensor:
        """True at the first position of the sequence and of every document."""
        first_SB = torch.zeros(self.length, self.batch, dtype=torch.bool)
        first_SB[0] = True
        for row, starts in enumerate(self.documents or ()):
            first_SB[list(starts), row] = True
        return first_SB.to(self.device)

    @cached_property
    def cos_sin_S(self) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the rotary angles of all keys, float32 [S, D/2] each."""
        assert self.inverse_frequencies is not None, "this geometry was made without rotary frequencies"
        position_S = self.position_S
        if position_S is None:
            position_S = torch.arange(self.length, device=self.device)
        return cos_sin(position_S, self.inverse_frequencies)

    def rotations(self, neuron_scale: float, dtype: torch.dtype) -> tuple[Rotation, Rotation]:
        """Rotations of the queries and of the keys for tensors of ``dtype``, in its accumulation dtype.

        ``neuron_scale`` multiplies the borrowed channel before and after RoPE.
        """
        wide = accumulation_dtype(dtype)
        return self.once(("rotations", neuron_scale, wide), lambda: self._rotations(neuron_scale, wide))

    def _rotations(self, neuron_scale: float, dtype: torch.dtype) -> tuple[Rotation, Rotation]:
        cos, sin = (x.to(dtype) for x in self.cos_sin_S)
        k_rotation = faded_rotation(cos, sin, neuron_scale)
        if self.query_starts is None:
            return k_rotation, k_rotation
        return faded_rotation(cos[self.query_T], sin[self.query_T], neuron_scale), k_rotation

    def once[T](self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first called for ``key``."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made


def _check_chunks(num_queries: int, length: int, starts: Sequence[int]) -> None:
    if not starts or num_queries % len(starts) or num_queries == 0:
        raise ValueError(f"{num_queries} queries in {len(starts)} chunks: give query_starts for equally long chunks")
    chunk = num_queries // len(starts)
    outside = [start for start in starts if not 0 <= start <= length - chunk]
    if outside:
        raise ValueError(
            f"query_starts={list(starts)}: chunks of {chunk} queries must lie within the sequence of {length} keys, "
            f"which those at {outside} do not"
        )


def _check_documents(rows: Sequence[Sequence[int]], batch: int, length: int) -> None:
    if len(rows) != batch:
        raise ValueError(f"documents of {len(rows)} rows for a batch of {batch}: give the start positions of each row")
    for row in rows:
        ascending = all(a < b for a, b in itertools.pairwise(row))
        if not row or row[0] != 0 or not ascending or row[-1] >= length:
            raise ValueError(
                f"document starts {list(row)}: must ascend from 0 and stay below the sequence length {length}"
            )

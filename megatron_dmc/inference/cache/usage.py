"""What the compressed cache really holds, beside what an uncompressed one would: entries and bytes.

Legend: L layers, B sequences of a batch, G KV heads.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import PagedKVCache
from megatron_dmc.ops.kv_quantization import AUTO
from megatron_dmc.support.units import binary_bytes


@dataclass(frozen=True)
class CacheUsage:
    """Memory of one or several sequences, read off a cache.

    Bytes are whole blocks of keys and values with their scales, plus the method's state and, in 8 bits, open entries.
    Block tables (4 bytes a block) are left out. The uncompressed cache has the same block size, the model's dtype and
    no state.
    """

    num_sequences: int
    num_tokens: int
    """Tokens seen, over all sequences."""
    entries: tuple[tuple[int, ...], ...]
    """Entries held, by layer and KV head."""
    blocks: tuple[tuple[int, ...], ...]
    """Blocks held, by layer and KV head."""
    uncompressed_blocks: int
    """Blocks that one head of one layer would hold without compression."""
    kv_dtype: str
    """Format of closed entries, as users know it."""
    block_bytes: int
    uncompressed_block_bytes: int
    """Bytes of a block in the model's dtype."""
    state_bytes: int
    """Bytes beside the blocks per layer and KV head, over all sequences: the method's state, and open entries."""

    @classmethod
    def of(cls, cache: PagedKVCache, rows: Sequence[int]) -> CacheUsage:
        """Usage of some rows of ``cache`` now."""
        index = list(rows)
        size = cache.shape.block_size
        return cls(
            num_sequences=len(index),
            num_tokens=sum(cache.num_tokens[row] for row in index),
            entries=_table(cache.cache_seqlens[:, index].sum(dim=1)),
            blocks=_table(cache.held_blocks[:, index].sum(dim=1)),
            uncompressed_blocks=sum(-(-cache.num_tokens[row] // size) for row in index),
            kv_dtype=cache.shape.kv_format.name,
            block_bytes=cache.shape.block_bytes,
            uncompressed_block_bytes=cache.shape.uncompressed_block_bytes,
            state_bytes=cache.shape.state_bytes * len(index),
        )

    @classmethod
    def total(cls, usages: Iterable[CacheUsage]) -> CacheUsage:
        """The sum over disjoint sets of sequences of one model; at least one."""
        parts = list(usages)
        return dataclasses.replace(
            parts[0],
            num_sequences=sum(part.num_sequences for part in parts),
            num_tokens=sum(part.num_tokens for part in parts),
            entries=_summed([part.entries for part in parts]),
            blocks=_summed([part.blocks for part in parts]),
            uncompressed_blocks=sum(part.uncompressed_blocks for part in parts),
            state_bytes=sum(part.state_bytes for part in parts),
        )

    @classmethod
    def of_ranks(cls, parts: Sequence[CacheUsage]) -> CacheUsage:
        """The same sequences on tensor-parallel ranks, each with its KV heads, in their order."""
        return dataclasses.replace(
            parts[0],
            entries=_beside([part.entries for part in parts]),
            blocks=_beside([part.blocks for part in parts]),
        )

    @property
    def num_heads(self) -> int:
        """Head caches per sequence: layers times KV heads."""
        return sum(len(row) for row in self.entries)

    @property
    def num_entries(self) -> int:
        """Entries held, over all layers and KV heads."""
        return sum(sum(row) for row in self.entries)

    @property
    def uncompressed_entries(self) -> int:
        """Entries without compression: one per token, layer and KV head."""
        return self.num_tokens * self.num_heads

    @property
    def compression_ratio(self) -> float:
        """Entries without / with compression, at least 1."""
        return self.uncompressed_entries / max(self.num_entries, 1)

    @property
    def bytes_held(self) -> int:
        """Bytes of all blocks and of what is kept beside them."""
        return sum(sum(row) for row in self.blocks) * self.block_bytes + self.num_heads * self.state_bytes

    @property
    def uncompressed_bytes(self) -> int:
        """Bytes of all blocks without compression, in the model's dtype."""
        return self.uncompressed_blocks * self.uncompressed_block_bytes * self.num_heads

    def summary(self) -> str:
        """One line for people."""
        bytes_ratio = self.uncompressed_bytes / max(self.bytes_held, 1)
        stored = "" if self.kv_dtype == AUTO.name else f" in {self.kv_dtype}"
        return (
            f"cache: {self.num_entries:,} entries{stored}, {binary_bytes(self.bytes_held)} for {self.num_tokens:,} "
            f"tokens; uncompressed: {self.uncompressed_entries:,} entries, {binary_bytes(self.uncompressed_bytes)} "
            f"(compression ratio {self.compression_ratio:.2f}, {bytes_ratio:.2f} in bytes)"
        )

    def to_dict(self) -> dict[str, Any]:
        """Totals, and tables by layer (rows) and KV head (columns), ready for JSON."""
        return {
            "num_sequences": self.num_sequences,
            "num_tokens": self.num_tokens,
            "compression_ratio": self.compression_ratio,
            "kv_dtype": self.kv_dtype,
            "entries": self.num_entries,
            "uncompressed_entries": self.uncompressed_entries,
            "bytes": self.bytes_held,
            "state_bytes": self.num_heads * self.state_bytes,
            "uncompressed_bytes": self.uncompressed_bytes,
            "bytes_ratio": self.uncompressed_bytes / max(self.bytes_held, 1),
            "per_layer_and_kv_head": {
                "compression_ratio": [[self.num_tokens / max(n, 1) for n in row] for row in self.entries],
                "entries": [list(row) for row in self.entries],
                "bytes": [[n * self.block_bytes + self.state_bytes for n in row] for row in self.blocks],
            },
        }


def _table(counts_LG: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in counts_LG.tolist())


def _beside(tables: list[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(itertools.chain(*rows)) for rows in zip(*tables, strict=True))


def _summed(tables: list[tuple[tuple[int, ...], ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*tables, strict=True))

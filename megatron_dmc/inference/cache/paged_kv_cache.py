"""The compressed cache of all sequences: one pool of blocks, from which every head of every layer takes its own.

A head cache is the list of entries of one (layer, sequence, KV head). It grows block by block, and only by its own
appends, so the heads of a sequence have different lengths. Beside the entries lives the state of the open segments.

Legend: L layers, B sequences of a batch, G KV heads, T entries, D head dim, P entries per block (``block_size``),
M blocks per head cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.inference.cache.block_allocator import BlockAllocator, OutOfBlocks
from megatron_dmc.ops.cache_update import state_shape
from megatron_dmc.ops.paged_attention import entry_slots

DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True)
class CacheShape:
    """What a cache is made for.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        dtype: of keys and values in the pool.
        window_size: of the model's segments; None for a model that does not compress, which needs no segment state.
        block_size: entries per block, at least 1.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window_size: int | None = None
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: must be at least 1 entry (16 by default)")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return 2 * self.block_size * self.head_dim * self.dtype.itemsize


class PagedKVCache:
    """Blocks, block tables, lengths and running sums; owns all memory of the sequences in it.

    A sequence occupies a row from :meth:`add_sequences` to :meth:`free_sequences`.

    Args:
        shape: of the model and its blocks.
        num_sequences: rows, the sequences held at once.
        num_blocks: size of the pool; None lets it grow by half whenever it is full.
        device: of all tensors.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_sequences: int,
        *,
        num_blocks: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = shape
        self._may_grow = num_blocks is None
        if num_blocks is None:
            num_blocks = shape.num_layers * shape.num_kv_heads * num_sequences
        self.allocator = BlockAllocator(num_blocks)
        self.k_blocks = torch.zeros(num_blocks, shape.block_size, shape.head_dim, dtype=shape.dtype, device=device)
        self.v_blocks = torch.zeros_like(self.k_blocks)
        rows = (shape.num_layers, num_sequences, shape.num_kv_heads)
        self.block_table = torch.zeros(*rows, 1, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(*rows, dtype=torch.int32, device=device)
        self.num_tokens = torch.zeros(num_sequences, dtype=torch.int64, device=device)
        """Tokens that each row has seen: the position of its next token."""
        self.segments: Tensor | None = None
        if shape.window_size is not None:
            self.segments = torch.zeros(*rows, *state_shape(shape.head_dim, shape.window_size), device=device)
        self._free_rows = list(reversed(range(num_sequences)))

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.k_blocks.device

    @property
    def num_free_sequences(self) -> int:
        """Rows that :meth:`add_sequences` can still give."""
        return len(self._free_rows)

    def add_sequences(self, count: int) -> Tensor:
        """Rows for ``count`` new sequences, int64 [count]; at most ``num_free_sequences``."""
        assert count <= len(self._free_rows), f"{count} rows needed, {len(self._free_rows)} free"
        return torch.tensor([self._free_rows.pop() for _ in range(count)], device=self.device)

    def free_sequences(self, rows_B: Tensor) -> None:
        """Give back the blocks and the rows of finished sequences."""
        num_blocks_LBG = self._num_blocks(self.cache_seqlens[:, rows_B])
        held_LBGM = self._table_columns() < num_blocks_LBG.unsqueeze(-1)
        self.allocator.release(self.block_table[:, rows_B][held_LBGM].tolist())
        self.cache_seqlens[:, rows_B] = 0
        self.num_tokens[rows_B] = 0
        self._free_rows.extend(rows_B.tolist())

    def write_prompt(self, layer: int, rows_B: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, lengths_BG: Tensor) -> None:
        """Store the entries of whole prompts in one layer of empty rows.

        Args:
            k_BGTD, v_BGTD: rotated keys and values of the entries in order; those at or after ``lengths_BG`` are not
                stored.
            lengths_BG: int32 entries of each head.

        Raises:
            OutOfBlocks: a pool of fixed size is too small. Nothing was stored.
        """
        needed_BGM = self._columns(k_BGTD.shape[2]) < self._num_blocks(lengths_BG).unsqueeze(-1)
        self._assign_blocks(layer, rows_B, needed_BGM.nonzero())
        entry_T = torch.arange(k_BGTD.shape[2], device=self.device)
        stored_BGT = entry_T < lengths_BG.unsqueeze(-1)
        slot_BGT = entry_slots(
            self.block_table[layer, rows_B], entry_T.expand_as(stored_BGT) * stored_BGT, self.shape.block_size
        )
        self._write(slot_BGT[stored_BGT], k_BGTD[stored_BGT], v_BGTD[stored_BGT])
        self.cache_seqlens[layer, rows_B] = lengths_BG

    def write_newest(self, layer: int, rows_B: Tensor, append_BG: Tensor, k_BGD: Tensor, v_BGD: Tensor) -> None:
        """Append an entry to some head caches of one layer, overwrite the newest of the others.

        Args:
            append_BG: bool; must be true for an empty head cache.
            k_BGD, v_BGD: rotated key and value of the newest entry.

        Raises:
            OutOfBlocks: a pool of fixed size is exhausted. Nothing was stored in this layer.
        """
        before_BG = self.cache_seqlens[layer, rows_B]
        starts_block_BG = append_BG & (before_BG % self.shape.block_size == 0)
        row_and_head = starts_block_BG.nonzero()
        column = before_BG[starts_block_BG] // self.shape.block_size
        self._assign_blocks(layer, rows_B, torch.cat([row_and_head, column.unsqueeze(-1)], dim=-1))
        after_BG = before_BG + append_BG
        newest_BG1 = (after_BG - 1).long().unsqueeze(-1)
        slot_BG = entry_slots(self.block_table[layer, rows_B], newest_BG1, self.shape.block_size).squeeze(-1)
        self._write(slot_BG, k_BGD, v_BGD)
        self.cache_seqlens[layer, rows_B] = after_BG

    def check_integrity(self) -> None:
        """Compare lengths, tables and free list. The message of the ``AssertionError`` is what does not hold."""
        self.allocator.check_integrity()
        num_blocks = self._num_blocks(self.cache_seqlens)
        held = self.block_table[self._table_columns() < num_blocks.unsqueeze(-1)].tolist()
        assert len(held) == len(set(held)), f"distinct blocks {len(set(held))} != blocks in tables {len(held)}"
        in_use = self.allocator.num_in_use
        assert len(held) == in_use, f"blocks in tables {len(held)} != blocks in use {in_use}"

    def _assign_blocks(self, layer: int, rows_B: Tensor, where: Tensor) -> None:
        """Give a new block to each of ``where``, int64 [.., (index into rows_B, head, column)]."""
        if not len(where):
            return
        try:
            blocks = self._allocate(len(where))
        except OutOfBlocks as error:
            held = self.shape.block_size * self.allocator.num_in_use
            raise OutOfBlocks(
                f"the cache is full: {error}, up to {held} entries held by {self._num_rows_in_use()} sequences; "
                "give the cache more blocks, decode fewer sequences at once, or shorten them"
            ) from None
        row, head, column = where.unbind(-1)
        width = self.block_table.shape[-1]
        longest = int(column.max()) + 1
        if longest > width:
            self.block_table = F.pad(self.block_table, (0, max(longest, 2 * width) - width))
        self.block_table[layer, rows_B[row], head, column] = torch.tensor(blocks, dtype=torch.int32, device=self.device)

    def _allocate(self, count: int) -> list[int]:
        missing = count - self.allocator.num_free
        if missing > 0 and self._may_grow:
            extra = max(missing, self.allocator.num_blocks // 2)
            self.k_blocks, self.v_blocks = (
                torch.cat([pool, pool.new_zeros(extra, *pool.shape[1:])]) for pool in (self.k_blocks, self.v_blocks)
            )
            self.allocator.extend(extra)
        return self.allocator.allocate(count)

    def _write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k_blocks.flatten(0, 1)[slots] = k
        self.v_blocks.flatten(0, 1)[slots] = v

    def _num_blocks(self, num_entries: Tensor) -> Tensor:
        return (num_entries + self.shape.block_size - 1) // self.shape.block_size

    def _columns(self, num_entries: int) -> Tensor:
        return torch.arange(-(-num_entries // self.shape.block_size), device=self.device)

    def _table_columns(self) -> Tensor:
        return torch.arange(self.block_table.shape[-1], device=self.device)

    def _num_rows_in_use(self) -> int:
        return len(self.num_tokens) - len(self._free_rows)

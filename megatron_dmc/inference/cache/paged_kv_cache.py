"""The cache of all sequences: one pool of blocks, from which every head of every layer takes its own.

A head cache is the list of entries of one (layer, sequence, KV head). Heads of one sequence may have different lengths.
Which entries new tokens write is the method's business (``megatron_dmc.methods``), and so is what :attr:`state` means;
here are memory and books. A pass reserves its blocks, writes layer by layer, and is committed.

Legend: L layers, B sequences of a pass, G KV heads, T new tokens, D head dim, P entries per block (``block_size``),
M blocks per head cache, E entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.inference.cache.allocator import Allocator, OutOfBlocks
from megatron_dmc.methods.base import HeadCaches, Keep, Slot, State, Update
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.paged_attention import entry_slots
from megatron_dmc.ops.paged_kv import PagedKV

DEFAULT_BLOCK_SIZE = 16


@dataclass(frozen=True)
class CacheShape:
    """What a cache is made for.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        dtype: of keys and values in the pool.
        state: what the method keeps for every head beside them.
        block_size: entries per block, at least 1.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    state: Mapping[str, Slot] = field(default_factory=dict)
    block_size: int = DEFAULT_BLOCK_SIZE

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size}: must be at least 1 entry (16 by default)")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, keys and values."""
        return 2 * self.block_size * self.head_dim * self.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes of the method's state of one head."""
        return sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in self.state.values())


class PagedKVCache:
    """Blocks, block tables, lengths and the method's state; owns all memory of the sequences in it.

    A sequence occupies a row from :meth:`add_sequences` to :meth:`free_sequences`.

    Args:
        shape: of the model and its blocks.
        num_sequences: rows, the sequences held at once.
        num_blocks: size of the pool; None lets it grow by half whenever it is full.
        device: of all tensors.

    Attributes:
        num_tokens: tokens that each row has seen, which is the position of its next one.
        cache_seqlens: int32 [L, rows, G] entries of each head cache.
        held_blocks: int32 [L, rows, G] blocks of each head cache, at least as many as its entries need.
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
        self.blocks = Allocator(num_blocks)
        self.rows = Allocator(num_sequences, "rows")
        self.k_blocks = torch.zeros(num_blocks, shape.block_size, shape.head_dim, dtype=shape.dtype, device=device)
        self.v_blocks = torch.zeros_like(self.k_blocks)
        heads = (shape.num_layers, num_sequences, shape.num_kv_heads)
        self.block_table = torch.zeros(*heads, 1, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(*heads, dtype=torch.int32, device=device)
        self.held_blocks = torch.zeros_like(self.cache_seqlens)
        self.state = {
            name: torch.zeros(*heads, *slot.shape, dtype=slot.dtype, device=device)
            for name, slot in shape.state.items()
        }
        self.num_tokens = [0] * num_sequences

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.k_blocks.device

    def add_sequences(self, count: int) -> list[int]:
        """Rows for ``count`` new sequences; at most ``rows.num_free``."""
        return self.rows.allocate(count)

    def free_sequences(self, rows: Sequence[int]) -> None:
        """Give back the blocks and the rows of finished sequences. A row that is free already is the caller's fault."""
        self.rows.release(rows)
        rows_B = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._release(slice(None), rows_B, torch.zeros_like(self.held_blocks[:, rows_B]))
        self.cache_seqlens[:, rows_B] = 0
        for tensor in self.state.values():
            tensor[:, rows_B] = 0
        for row in rows:
            self.num_tokens[row] = 0

    def reserve(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Take the blocks that ``counts`` new tokens need at most, each of them appended to every head cache.

        A pool that grows takes those of several tokens layer by layer, while they are written: what a layer did not
        need is there for the next one.

        Raises:
            OutOfBlocks: a pool of fixed size is too small. Nothing was taken.
        """
        if not self._may_grow or max(counts) == 1:
            self._reserve(slice(None), torch.tensor(rows, device=self.device), counts)

    def _reserve(self, layers: slice, rows_B: Tensor, counts: Sequence[int]) -> None:
        count_B1 = torch.tensor(counts, dtype=torch.int32, device=self.device).unsqueeze(-1)
        held_LBG = self.held_blocks[layers, rows_B]
        wanted_LBG = torch.maximum(held_LBG, self._num_blocks(self.cache_seqlens[layers, rows_B] + count_B1))
        missing = int((wanted_LBG - held_LBG).sum())
        if not missing:
            return
        blocks = torch.tensor(self._allocate(missing), dtype=torch.int32, device=self.device)
        self._widen(int(wanted_LBG.max()))
        column_M = self._columns()
        new_LBGM = (column_M >= held_LBG.unsqueeze(-1)) & (column_M < wanted_LBG.unsqueeze(-1))
        self.block_table[layers, rows_B] = self.block_table[layers, rows_B].masked_scatter(new_LBGM, blocks)
        self.held_blocks[layers, rows_B] = wanted_LBG

    def before(self, layer: int, step: Step) -> tuple[State, Tensor]:
        """State and int32 lengths [B, G] of the head caches of a pass in one layer."""
        state = {name: tensor[layer, step.rows_B] for name, tensor in self.state.items()}
        return state, self.cache_seqlens[layer, step.rows_B]

    def write(self, layer: int, step: Step, update: Update) -> HeadCaches:
        """Store what new tokens do to the head caches of one layer; blocks that several did not need go back."""
        if not step.decodes:
            self._reserve(slice(layer, layer + 1), step.rows_B, step.counts)
        table_BGM, before_BG = self.block_table[layer, step.rows_B], self.cache_seqlens[layer, step.rows_B]
        end_TG = update.entry_TG + 1
        if step.decodes:
            slot_TG = entry_slots(table_BGM, update.entry_TG.long().unsqueeze(-1), self.shape.block_size).squeeze(-1)
            self._store(slot_TG, update.k_TGD, update.v_TGD)
            length_BG = torch.maximum(before_BG, end_TG)
        else:
            token, head = (end_TG > 0).nonzero(as_tuple=True)
            entry = update.entry_TG[token, head].long()
            block = table_BGM[step.sequence_T[token], head, entry // self.shape.block_size].long()
            slots = block * self.shape.block_size + entry % self.shape.block_size
            self._store(slots, update.k_TGD[token, head], update.v_TGD[token, head])
            sequence_TG = step.sequence_T.unsqueeze(-1).expand_as(end_TG)
            length_BG = before_BG.scatter_reduce(0, sequence_TG, end_TG, "amax")
            self._release(slice(layer, layer + 1), step.rows_B, self._num_blocks(length_BG).unsqueeze(0))
        self.cache_seqlens[layer, step.rows_B] = length_BG
        return HeadCaches(PagedKV(self.k_blocks, self.v_blocks), table_BGM, before_BG, length_BG)

    def set_state(self, layer: int, step: Step, state: State) -> None:
        """Keep the method's state of the head caches of one layer."""
        for name, tensor in state.items():
            self.state[name][layer, step.rows_B] = tensor

    def compact(self, layer: int, step: Step, keep: Keep) -> None:
        """Move the entries that survive to the front of their head caches."""
        table_BGM = self.block_table[layer, step.rows_B]
        place_E = torch.arange(int(keep.length_BG.max()), device=self.device)
        kept_BGE = place_E < keep.length_BG.unsqueeze(-1)
        entry_BGE = torch.where(kept_BGE, keep.entry_BGE[..., : len(place_E)], 0)
        from_BGE = entry_slots(table_BGM, entry_BGE, self.shape.block_size)
        to_BGE = entry_slots(table_BGM, torch.where(kept_BGE, place_E, 0), self.shape.block_size)
        for pool in (self.k_blocks, self.v_blocks):
            entries = pool.flatten(0, 1)
            entries[to_BGE[kept_BGE]] = entries[from_BGE[kept_BGE]]
        self.cache_seqlens[layer, step.rows_B] = keep.length_BG
        self._release(slice(layer, layer + 1), step.rows_B, self._num_blocks(keep.length_BG).unsqueeze(0))
        self.set_state(layer, step, keep.state)

    def commit(self, step: Step) -> None:
        """End a pass: its tokens count."""
        for row, count in zip(step.rows, step.counts, strict=True):
            self.num_tokens[row] += count

    def check_integrity(self) -> None:
        """Compare lengths, tables and free lists. The message of the ``AssertionError`` is what does not hold."""
        self.blocks.check_integrity()
        self.rows.check_integrity()
        held = self.block_table[self._columns() < self.held_blocks.unsqueeze(-1)].tolist()
        assert len(held) == len(set(held)), f"distinct blocks {len(set(held))} != blocks in tables {len(held)}"
        in_use = self.blocks.num_in_use
        assert len(held) == in_use, f"blocks in tables {len(held)} != blocks in use {in_use}"
        short = int((self._num_blocks(self.cache_seqlens) > self.held_blocks).sum())
        assert not short, f"head caches with fewer blocks than entries need: {short} != 0"
        occupied = {row for row, held in enumerate(self.held_blocks.sum(dim=(0, 2)).tolist()) if held}
        stray = sorted(row for row in occupied if not self.rows.is_in_use(row))
        assert not stray, f"free rows that hold blocks: {stray} != []"

    def _release(self, layers: slice, rows_B: Tensor, keep_LBG: Tensor) -> None:
        """Give back the blocks of each head cache behind the first ``keep_LBG``."""
        column_M, held_LBG1 = self._columns(), self.held_blocks[layers, rows_B].unsqueeze(-1)
        surplus_LBGM = (column_M >= keep_LBG.unsqueeze(-1)) & (column_M < held_LBG1)
        self.blocks.release(self.block_table[layers, rows_B][surplus_LBGM].tolist())
        self.held_blocks[layers, rows_B] = keep_LBG

    def _allocate(self, count: int) -> list[int]:
        missing = count - self.blocks.num_free
        if missing > 0 and self._may_grow:
            self._grow(max(missing, self.blocks.total // 2))
        try:
            return self.blocks.allocate(count)
        except OutOfBlocks as error:
            held = self.shape.block_size * self.blocks.num_in_use
            raise OutOfBlocks(
                f"the cache is full: {error}, up to {held} entries held by {self.rows.num_in_use} sequences; "
                "give the cache more blocks, decode fewer sequences at once, or shorten them"
            ) from None

    def _grow(self, extra: int) -> None:
        self.k_blocks, self.v_blocks = (
            torch.cat([pool, pool.new_zeros(extra, *pool.shape[1:])]) for pool in (self.k_blocks, self.v_blocks)
        )
        self.blocks.extend(extra)

    def _widen(self, num_blocks: int) -> None:
        """Let every head cache have so many blocks."""
        width = self.block_table.shape[-1]
        if num_blocks > width:
            self.block_table = F.pad(self.block_table, (0, max(num_blocks, 2 * width) - width))

    def _store(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        self.k_blocks.flatten(0, 1)[slots] = k
        self.v_blocks.flatten(0, 1)[slots] = v

    def _num_blocks(self, num_entries: Tensor) -> Tensor:
        return (num_entries + self.shape.block_size - 1) // self.shape.block_size

    def _columns(self) -> Tensor:
        return torch.arange(self.block_table.shape[-1], device=self.device)

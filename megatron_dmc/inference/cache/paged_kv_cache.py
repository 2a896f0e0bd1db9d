"""The cache of all sequences: one pool of blocks, from which every head of every layer takes its own.

A head cache is the list of entries of one (layer, sequence, KV head). Heads of one sequence may have different lengths.
Which entries new tokens write is the method's business (``megatron_dmc.methods``), and so is what :attr:`state` means;
here are memory and books. A pass reserves its blocks, writes layer by layer, and is committed.

The books (tables, lengths, who holds which block) are tensors on the cache's device. A pass that decodes reads nothing
back, unless the host's own lower bound of free blocks says that they may not suffice: then it reads one integer. Passes
over several tokens of a sequence read back how many blocks they take.

Legend: L layers, B sequences of a pass, G KV heads, T new tokens, D head dim, P entries per block (``block_size``),
M blocks per head cache, E entries, C copies of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.inference.cache.allocator import Allocator, OutOfBlocks
from megatron_dmc.inference.cache.blocks import Blocks
from megatron_dmc.inference.cache.decoding import Decoding, Tables
from megatron_dmc.inference.cache.entry_pool import EntryPool
from megatron_dmc.inference.cache.memory import available_bytes
from megatron_dmc.methods.base import HeadCaches, Keep, Slot, State, Update
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.kv_quantization import AUTO, KVFormat
from megatron_dmc.ops.paged_attention import plan_decode

DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class CacheShape:
    """What a cache is made for.

    Args:
        num_layers, num_kv_heads, head_dim: of the model.
        dtype: of the model's keys and values.
        state: what the method keeps for every head beside them.
        only_newest_changes: whether the method writes no entry but the newest and the one after it, so that copies of a
            sequence can share full blocks.
        block_size: entries per block, at least 1; kernels take powers of 2 from 16 to 64.
        max_tokens: tokens of a sequence; makes the size of a pool for which none is given.
        kv_format: of entries in the pool; in 8 bits the newest of every head stays in ``dtype``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    state: Mapping[str, Slot] = field(default_factory=dict)
    only_newest_changes: bool = False
    block_size: int = DEFAULT_BLOCK_SIZE
    max_tokens: int = 4096
    kv_format: KVFormat = AUTO

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(
                f"block_size={self.block_size}: must be at least 1 entry ({DEFAULT_BLOCK_SIZE} by default)"
            )

    @property
    def num_heads(self) -> int:
        """Head caches of a sequence."""
        return self.num_layers * self.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys, values and their scales."""
        return self.kv_format.block_bytes(self.block_size, self.head_dim, self.dtype)

    @property
    def uncompressed_block_bytes(self) -> int:
        """Bytes of a block whose entries are stored in the model's dtype."""
        return AUTO.block_bytes(self.block_size, self.head_dim, self.dtype)

    @property
    def state_bytes(self) -> int:
        """Bytes that one head keeps beside its blocks: the method's state, and in 8 bits the open entry."""
        state = sum(torch.Size(slot.shape).numel() * slot.dtype.itemsize for slot in self.state.values())
        return state + self.kv_format.open_entry_bytes(self.head_dim, self.dtype)

    def num_blocks(self, num_sequences: int, device: torch.device) -> int:
        """Blocks that so many sequences need at most, without compression, as far as there is memory."""
        most = num_sequences * self.num_heads * (self.max_tokens // self.block_size + 1)
        return max(1, min(most, available_bytes(device) // self.block_bytes))


class PagedKVCache:
    """Blocks, block tables, lengths and the method's state; owns all memory of the sequences in it.

    A sequence occupies a row from :meth:`add_sequences` or :meth:`fork` to :meth:`free_sequences`.

    Args:
        shape: of the model and its blocks.
        num_sequences: rows, the sequences held at once.
        num_blocks: size of the pool; None: :meth:`CacheShape.num_blocks`. On a CPU, blocks take memory when they are
            first written.
        may_grow: a full pool becomes half as large again, which moves it.
        device: of all tensors.

    Attributes:
        num_tokens: tokens that each row has seen, which is the position of its next one.
        cache_seqlens: int32 [L, rows, G] entries of each head cache.
        held_blocks: int32 [L, rows, G] blocks of each head cache, at least as many as its entries need.

    Raises:
        ValueError: the system has no room for a pool of that size.
    """

    def __init__(
        self,
        shape: CacheShape,
        num_sequences: int,
        *,
        num_blocks: int | None = None,
        may_grow: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        device = torch.device(device)
        if num_blocks is None:
            num_blocks = shape.num_blocks(num_sequences, device)
        self.shape, self.may_grow = shape, may_grow
        heads = (shape.num_layers, num_sequences, shape.num_kv_heads)
        pool = (num_blocks, shape.block_size, shape.head_dim)
        self.pool = EntryPool(pool, heads, shape.dtype, shape.kv_format, device)
        self.blocks = Blocks(num_blocks, shape.num_layers, device)
        self.rows = Allocator(num_sequences)
        self.block_table = torch.zeros(*heads, 1, dtype=torch.int32, device=device)
        self.cache_seqlens = torch.zeros(*heads, dtype=torch.int32, device=device)
        self.held_blocks = torch.zeros_like(self.cache_seqlens)
        self.state = {
            name: torch.zeros(*heads, *slot.shape, dtype=slot.dtype, device=device)
            for name, slot in shape.state.items()
        }
        self.num_tokens = [0] * num_sequences
        self._free_at_least = num_blocks
        self._tables: Tables | None = None
        """Those of the last step of decoding; None once one of them changed."""
        self._decoding: Decoding | None = None

    @property
    def device(self) -> torch.device:
        """Where the cache lives."""
        return self.pool.device

    def add_sequences(self, count: int) -> list[int]:
        """Rows for ``count`` new sequences; at most ``rows.num_free``."""
        return self.rows.allocate(count)

    def fork(self, row: int, count: int) -> list[int]:
        """Rows for ``count`` more sequences that begin as copies of one, with the same entries and state.

        Blocks that no step will change any more are shared; those that one may change are copied.

        Raises:
            OutOfBlocks: too few blocks or rows are free. Nothing was taken.
        """
        needed_LG1 = self._num_blocks(self.cache_seqlens[:, row]).unsqueeze(-1)
        num_shared_LG1 = needed_LG1 - 1 if self.shape.only_newest_changes else torch.zeros_like(needed_LG1)
        column_M, source_LGM = self._columns(), self.block_table[:, row]
        is_shared_LGM = column_M < num_shared_LG1
        is_copied_LGM = (column_M < needed_LG1) & ~is_shared_LGM
        source_LCGM, is_copied_LCGM = (x.unsqueeze(1).repeat(1, count, 1, 1) for x in (source_LGM, is_copied_LGM))
        rows = self.rows.allocate(count)
        try:
            block_LCGM = self._take(is_copied_LCGM)
        except OutOfBlocks:
            self.rows.release(rows)
            raise
        self.blocks.hold(source_LGM, count * is_shared_LGM)
        self.pool.copy_blocks(self.pool, source_LCGM[is_copied_LCGM], block_LCGM[is_copied_LCGM])
        self.pool.copy_open(self.pool, [row] * count, rows)
        self.block_table[:, rows] = torch.where(is_copied_LCGM, block_LCGM, source_LCGM)
        self.held_blocks[:, rows] = needed_LG1.transpose(1, 2)
        for tensor in (self.cache_seqlens, *self.state.values()):
            tensor[:, rows] = tensor[:, row : row + 1]
        for new in rows:
            self.num_tokens[new] = self.num_tokens[row]
        return rows

    def copies(self, rows: Sequence[int]) -> PagedKVCache:
        """A cache of its own that holds copies of some sequences, in this order; one may be named several times."""
        needed_LBG = self._num_blocks(self.cache_seqlens[:, rows])
        is_held_LBGM = self._columns() < needed_LBG.unsqueeze(-1)
        num_blocks = int(is_held_LBGM.sum()) if self.may_grow else None
        copied = PagedKVCache(self.shape, len(rows), num_blocks=num_blocks, may_grow=self.may_grow, device=self.device)
        copied.add_sequences(len(rows))
        block_LBGM = copied._take(is_held_LBGM)
        source_LBGM = self.block_table[:, rows]
        copied.pool.copy_blocks(self.pool, source_LBGM[is_held_LBGM], block_LBGM[is_held_LBGM])
        copied.pool.copy_open(self.pool, rows, range(len(rows)))
        copied.block_table, copied.held_blocks = block_LBGM, needed_LBG
        copied.cache_seqlens = self.cache_seqlens[:, rows]
        copied.state = {name: tensor[:, rows] for name, tensor in self.state.items()}
        copied.num_tokens = [self.num_tokens[row] for row in rows]
        return copied

    def free_sequences(self, rows: Sequence[int]) -> None:
        """Give back the blocks and the rows of finished sequences. A row that is free already is the caller's fault."""
        self.rows.release(rows)
        rows_B = torch.tensor(rows, dtype=torch.int64, device=self.device)
        self._shrink(slice(None), rows_B, torch.zeros_like(self.held_blocks[:, rows_B]))
        for tensor in (self.cache_seqlens, *self.state.values()):
            tensor[:, rows_B] = 0
        self.pool.forget_open(rows_B)
        for row in rows:
            self.num_tokens[row] = 0

    def reserve(self, rows: Sequence[int], counts: Sequence[int]) -> None:
        """Take the blocks that new tokens need at most, where each sequence has one: it may append to every head cache.

        Several tokens take theirs layer by layer, while they are written: only then it is known how many they need.

        Raises:
            OutOfBlocks: too few are free. Nothing was taken.
        """
        self._widen(max(self.num_tokens[row] + count for row, count in zip(rows, counts, strict=True)))
        if max(counts) > 1:
            return
        rows_B = torch.tensor(rows, device=self.device)
        held_LBG = self.held_blocks[:, rows_B]
        is_full_LBG = self.cache_seqlens[:, rows_B] == held_LBG * self.shape.block_size
        if self.device.type == "cpu" and not is_full_LBG.any():
            return
        block_LBG = self._take(is_full_LBG)
        if self.device.type == "cpu":
            self._clear(block_LBG[is_full_LBG])
        layer_L11, head_G = (torch.arange(size, device=self.device) for size in held_LBG.shape[::2])
        column_LBG = held_LBG.clamp(max=self.block_table.shape[-1] - 1)
        place = (layer_L11.view(-1, 1, 1), rows_B.unsqueeze(-1), head_G, column_LBG)
        self.block_table[place] = torch.where(is_full_LBG, block_LBG, self.block_table[place])
        self.held_blocks[:, rows_B] = held_LBG + is_full_LBG

    def before(self, layer: int, step: Step) -> tuple[State, Tensor]:
        """State and int32 lengths [B, G] of the head caches of a pass in one layer."""
        state = {name: tensor[layer, step.rows_B] for name, tensor in self.state.items()}
        if step.decodes:
            return state, self._decoding_of(step).length_LBG[layer]
        return state, self.cache_seqlens[layer, step.rows_B]

    def write(self, layer: int, step: Step, update: Update) -> HeadCaches:
        """Store what new tokens do to the head caches of one layer.

        Raises:
            OutOfBlocks: several tokens of a sequence need more than are free. The pass is lost: its sequences must be
                freed.
        """
        return self._write_one(layer, step, update) if step.decodes else self._write_several(layer, step, update)

    def _write_one(self, layer: int, step: Step, update: Update) -> HeadCaches:
        decoding, (k_BGD, v_BGD, entry_BG) = self._decoding_of(step), update[:3]
        table_BGM, before_BG = decoding.tables.block_LBGM[layer], decoding.length_LBG[layer]
        if self.shape.only_newest_changes and not self.pool.kv.quantised:
            self.pool.write(decoding.slots(layer, entry_BG), k_BGD, v_BGD)
        else:
            self.pool.write_newest(layer, step.rows_B, table_BGM, entry_BG, k_BGD, v_BGD)
        length_BG = torch.maximum(before_BG, entry_BG + 1)
        self.cache_seqlens[layer, step.rows_B] = length_BG
        plan = None if decoding.tables.plans is None else decoding.tables.plans[layer]
        return HeadCaches(self.pool.of(layer, step.rows_B), table_BGM, before_BG, length_BG, plan)

    def _write_several(self, layer: int, step: Step, update: Update) -> HeadCaches:
        before_BG, end_TG = self.cache_seqlens[layer, step.rows_B], update.entry_TG + 1
        sequence_TG = step.sequence_T.unsqueeze(-1).expand_as(end_TG)
        length_BG = before_BG.scatter_reduce(0, sequence_TG, end_TG, "amax")
        self._extend(layer, step.rows_B, length_BG)
        table_BGM = self.block_table[layer, step.rows_B]
        k_BGD, v_BGD, entry_BG = (x[step.last_B] for x in update[:3])
        self.pool.write_newest(layer, step.rows_B, table_BGM, entry_BG, k_BGD, v_BGD)
        others_TG = update.entry_TG.index_fill(0, step.last_B, -1)
        self.pool.write_packed(table_BGM, step.sequence_T, others_TG, update.k_TGD, update.v_TGD)
        self.cache_seqlens[layer, step.rows_B] = length_BG
        return HeadCaches(self.pool.of(layer, step.rows_B), table_BGM, before_BG, length_BG)

    def set_state(self, layer: int, step: Step, state: State) -> None:
        """Keep the method's state of the head caches of one layer."""
        for name, tensor in state.items():
            self.state[name][layer, step.rows_B] = tensor

    def compact(self, layer: int, step: Step, keep: Keep) -> None:
        """Move the entries that survive to the front of their head caches."""
        table_BGM = self.block_table[layer, step.rows_B]
        place_E = torch.arange(int(keep.length_BG.max()), device=self.device)
        kept_BGE = place_E < keep.length_BG.unsqueeze(-1)
        entry_BGE = keep.entry_BGE[..., : len(place_E)]
        self.pool.compact(layer, step.rows_B, table_BGM, entry_BGE, kept_BGE)
        self.cache_seqlens[layer, step.rows_B] = keep.length_BG
        self._shrink(slice(layer, layer + 1), step.rows_B, self._num_blocks(keep.length_BG).unsqueeze(0))
        self.set_state(layer, step, keep.state)

    def commit(self, step: Step) -> None:
        """End a pass: its tokens count."""
        for row, count in zip(step.rows, step.counts, strict=True):
            self.num_tokens[row] += count
        self._decoding = None

    def check_integrity(self) -> None:
        """Compare lengths, tables and books. The message of the ``AssertionError`` is what does not hold."""
        self.rows.check_integrity()
        self.pool.check_integrity(self.cache_seqlens, self.shape.only_newest_changes)
        is_held = self._columns() < self.held_blocks.unsqueeze(-1)
        self.blocks.check_integrity(self.block_table[is_held])
        num_free = self.blocks.num_free
        assert self._free_at_least <= num_free, f"free at least {self._free_at_least} > free {num_free}"
        needed = self._num_blocks(self.cache_seqlens)
        short = int((needed > self.held_blocks).sum())
        assert not short, f"head caches with fewer blocks than entries need: {short} != 0"
        first_LBG = needed - 1 if self.shape.only_newest_changes else torch.zeros_like(needed)
        may_change = is_held & (self._columns() >= first_LBG.unsqueeze(-1))
        shared = int((self.blocks.holders_X[self.block_table[may_change]] > 1).sum())
        assert not shared, f"shared blocks that a step may change: {shared} != 0"
        occupied = {row for row, held in enumerate(self.held_blocks.sum(dim=(0, 2)).tolist()) if held}
        stray = sorted(row for row in occupied if not self.rows.is_in_use(row))
        assert not stray, f"free rows that hold blocks: {stray} != []"

    def _extend(self, layer: int, rows_B: Tensor, length_BG: Tensor) -> None:
        """Take the blocks that so many entries of each head cache need in one layer; those that are there stay."""
        held_BG1 = self.held_blocks[layer, rows_B].unsqueeze(-1)
        wanted_BG1 = torch.maximum(held_BG1, self._num_blocks(length_BG).unsqueeze(-1))
        is_new_BGM = (self._columns() >= held_BG1) & (self._columns() < wanted_BG1)
        (block_BGM,) = self._take(is_new_BGM.unsqueeze(0), slice(layer, layer + 1))
        self._clear(block_BGM[is_new_BGM & (self._columns() == wanted_BG1 - 1)])
        table_BGM = self.block_table[layer, rows_B]
        self.block_table[layer, rows_B] = torch.where(is_new_BGM, block_BGM, table_BGM)
        self.held_blocks[layer, rows_B] = wanted_BG1.squeeze(-1)

    def _shrink(self, layers: slice, rows_B: Tensor, keep_LBG: Tensor) -> None:
        """Give back the blocks of each head cache behind the first ``keep_LBG``."""
        column_M, held_LBG1 = self._columns(), self.held_blocks[layers, rows_B].unsqueeze(-1)
        is_surplus_LBGM = (column_M >= keep_LBG.unsqueeze(-1)) & (column_M < held_LBG1)
        self.blocks.release(self.block_table[layers, rows_B], is_surplus_LBGM)
        self._tables = None
        self.held_blocks[layers, rows_B] = keep_LBG

    def _take(self, is_wanted: Tensor, layers: slice = slice(None)) -> Tensor:
        """int32 blocks where ``is_wanted`` [L, ...], any numbers elsewhere.

        Raises:
            OutOfBlocks: too few are free. Nothing was taken.
        """
        self._see_free(is_wanted)
        self._tables = None
        block = self.blocks.take(is_wanted.flatten(1), layers).view(is_wanted.shape)
        return block.int()

    def _clear(self, blocks: Tensor) -> None:
        """Put zeros into blocks that may stay partly empty: attention on a CPU multiplies what is there by 0.

        What another sequence left behind might not be finite.
        """
        self.pool.clear(blocks)

    def _see_free(self, is_wanted: Tensor) -> None:
        at_most = is_wanted.numel()
        if at_most <= self._free_at_least:
            self._free_at_least -= at_most
            return
        left = int(self.blocks.count_free() - is_wanted.sum())
        if left < 0 and self.may_grow:
            left += self._grow(-left)
        if left < 0:
            num_free = self.blocks.num_free
            raise OutOfBlocks(
                f"the cache is full: {num_free - left} blocks needed, {num_free} of {self.blocks.total} free, up to "
                f"{self.shape.block_size * self.blocks.num_in_use} entries held by {self.rows.num_in_use} sequences; "
                "give the cache more blocks, decode fewer sequences at once, or shorten them"
            )
        self._free_at_least = left

    def _grow(self, missing: int) -> int:
        """How many blocks were added."""
        extra = max(missing, self.blocks.total // 2)
        self.pool.grow(extra)
        self.blocks.extend(extra)
        return extra

    def _widen(self, num_entries: int) -> None:
        """Let tables have room for the blocks of so many entries."""
        num_blocks, width = -(-num_entries // self.shape.block_size), self.block_table.shape[-1]
        if num_blocks > width:
            self.block_table = F.pad(self.block_table, (0, max(num_blocks, 2 * width) - width))

    def _decoding_of(self, step: Step) -> Decoding:
        if self._decoding is None or self._decoding.step is not step:
            if self._tables is None or self._tables.rows != tuple(step.rows):
                block_LBGM, held_LBG = self.block_table[:, step.rows_B], self.held_blocks[:, step.rows_B]
                is_read_in_place = self.device.type == "cpu" and not self.pool.kv.quantised
                plans = plan_decode(block_LBGM, held_LBG, self.pool.kv.k_blocks) if is_read_in_place else None
                self._tables = Tables(tuple(step.rows), block_LBGM, plans)
            length_LBG = self.cache_seqlens[:, step.rows_B]
            self._decoding = Decoding.of(step, self._tables, length_LBG, self.shape.block_size)
        return self._decoding

    def _num_blocks(self, num_entries: Tensor) -> Tensor:
        return (num_entries + self.shape.block_size - 1) // self.shape.block_size

    def _columns(self) -> Tensor:
        return torch.arange(self.block_table.shape[-1], device=self.device)

"""The memory of entries: blocks, and in 8 bits their scales and the open entry of every head.

In 8 bits the newest entry of a head is open: the next token may still change it, so it stays beside the blocks, in the
model's dtype. It closes when the next token writes another place, and is quantised then; one that is overwritten or
evicted while it is open never is. Copies and moves take stored numbers with their scales: nothing is quantised twice.

Legend: L layers, A rows of the cache, B sequences of a pass, G KV heads, D head dim, X blocks, P entries per block, M
blocks per head cache, E entries, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.inference.cache.memory import zeros
from megatron_dmc.ops.kv_quantization import KVFormat, quantise
from megatron_dmc.ops.paged_attention import entry_slots
from megatron_dmc.ops.paged_kv import PagedKV


class EntryPool:
    """Keys and values of all head caches; who holds which block is known elsewhere.

    Args:
        blocks: X, P and D.
        heads: L, A and G.
        dtype: of the model.
        kv_format: of closed entries.
        device: of all tensors.

    Attributes:
        kv: blocks and scales of all head caches; open entries [L, A, G, ...], at place -1 where a head has none.

    Raises:
        ValueError: the system has no room for a pool of that size.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int],
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        kv_format: KVFormat,
        device: torch.device,
    ) -> None:
        self.kv_format = kv_format
        self.kv = PagedKV(*(zeros(blocks, kv_format.dtype or dtype, device) for _ in range(2)))
        if kv_format.dtype is not None:
            k_scale, v_scale = (zeros(blocks[:2], torch.float32, device) for _ in range(2))
            k_open, v_open = (torch.zeros(*heads, blocks[-1], dtype=dtype, device=device) for _ in range(2))
            open_entry = torch.full(heads, -1, dtype=torch.int32, device=device)
            self.kv = PagedKV(*self.kv[:2], k_scale, v_scale, k_open, v_open, open_entry)

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.kv.k_blocks.device

    def of(self, layer: int, rows_B: Tensor) -> PagedKV:
        """The entries of some sequences in one layer."""
        return self.kv.of_rows((layer, rows_B))

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store closed entries [..., D] at places [...] of the flattened blocks."""
        kv = self.kv
        for x, blocks, scale in ((k, kv.k_blocks, kv.k_scale), (v, kv.v_blocks, kv.v_scale)):
            if scale is None:
                blocks.flatten(0, 1)[slots] = x
            else:
                blocks.flatten(0, 1)[slots], scale.flatten()[slots] = quantise(x, self.kv_format)

    def write_packed(
        self, table_BGM: Tensor, sequence_T: Tensor, entry_TG: Tensor, k_TGD: Tensor, v_TGD: Tensor
    ) -> None:
        """Store closed entries of T packed tokens, where their place ``entry_TG`` is not -1."""
        token, head = (entry_TG >= 0).nonzero(as_tuple=True)
        entry, block_size = entry_TG[token, head].long(), self.kv.block_size
        block = table_BGM[sequence_T[token], head, entry // block_size].long()
        self.write(block * block_size + entry % block_size, k_TGD[token, head], v_TGD[token, head])

    def write_newest(
        self, layer: int, rows_B: Tensor, table_BGM: Tensor, entry_BG: Tensor, k_BGD: Tensor, v_BGD: Tensor
    ) -> None:
        """Store the newest entry of every head at place ``entry_BG``: in 8 bits it opens, and the former one closes."""
        k_open, v_open, open_entry = self.kv[4:]
        at = (layer, rows_B)
        if k_open is not None and v_open is not None and open_entry is not None:
            before_BG, k_before_BGD, v_before_BGD = open_entry[at], k_open[at], v_open[at]
            k_open[at], v_open[at], open_entry[at] = k_BGD, v_BGD, entry_BG
            # Where none closes, the place of the open entry is written, which nobody reads: no device is waited for.
            entry_BG = torch.where(before_BG < 0, entry_BG, before_BG)
            k_BGD, v_BGD = k_before_BGD, v_before_BGD
        slots_BG1 = entry_slots(table_BGM, entry_BG.long().unsqueeze(-1), self.kv.block_size)
        self.write(slots_BG1.squeeze(-1), k_BGD, v_BGD)

    def compact(self, layer: int, rows_B: Tensor, table_BGM: Tensor, entry_BGE: Tensor, is_kept_BGE: Tensor) -> None:
        """Move the entries from places ``entry_BGE`` to 0, 1, ... of their head caches, where ``is_kept_BGE``."""
        to_E = torch.arange(entry_BGE.shape[-1], device=self.device)
        from_slots, to_slots = (
            entry_slots(table_BGM, torch.where(is_kept_BGE, place, 0), self.kv.block_size)[is_kept_BGE]
            for place in (entry_BGE, to_E)
        )
        for tensor in self._by_block():
            entries = tensor.flatten(0, 1)
            entries[to_slots] = entries[from_slots]
        open_entry = self.kv.open_entry_BG
        if open_entry is not None:
            is_open_BGE = is_kept_BGE & (entry_BGE == open_entry[layer, rows_B].unsqueeze(-1))
            open_entry[layer, rows_B] = torch.where(is_open_BGE, to_E, -1).amax(-1).int()

    def copy_blocks(self, source: EntryPool, from_X: Tensor, to_X: Tensor) -> None:
        """Fill blocks with those of a pool of the same kind, which may be this one."""
        for mine, theirs in zip(self._by_block(), source._by_block(), strict=True):
            mine[to_X] = theirs[from_X]

    def copy_open(self, source: EntryPool, from_A: Sequence[int], to_A: Sequence[int]) -> None:
        """Give rows the open entries that others have in a pool of the same kind."""
        for mine, theirs in zip(self.kv[4:], source.kv[4:], strict=True):
            if mine is not None and theirs is not None:
                mine[:, to_A] = theirs[:, from_A]

    def forget_open(self, rows_A: Tensor) -> None:
        """Let rows have no open entries."""
        if self.kv.open_entry_BG is not None:
            self.kv.open_entry_BG[:, rows_A] = -1

    def clear(self, blocks_X: Tensor) -> None:
        """Fill blocks with zeros."""
        for tensor in self._by_block():
            tensor[blocks_X] = 0

    def grow(self, count: int) -> None:
        """Add blocks behind the others, which moves all of them."""
        grown = [torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) for tensor in self._by_block()]
        self.kv = PagedKV(*grown, *self.kv[len(grown) :])

    def check_integrity(self, cache_seqlens: Tensor, only_newest_changes: bool) -> None:
        """Compare open entries with lengths. The message of the ``AssertionError`` is what does not hold."""
        open_entry = self.kv.open_entry_BG
        if open_entry is None:
            return
        beyond = int(((open_entry < -1) | (open_entry > cache_seqlens - 1)).sum())
        assert not beyond, f"open entries outside their head caches: {beyond} != 0"
        others = int((open_entry != cache_seqlens - 1).sum()) if only_newest_changes else 0
        assert not others, f"open entries that are not the last ones: {others} != 0"

    def _by_block(self) -> list[Tensor]:
        """Tensors [X, P, ...]: blocks, and their scales where there are any."""
        return [tensor for tensor in self.kv[:4] if tensor is not None]

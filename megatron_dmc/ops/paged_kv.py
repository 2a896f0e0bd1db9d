"""Where the entries of all head caches lie: the layout that the cache, its update and attention share.

Blocks hold entries in the model's dtype, or in 8 bits with a scale per entry (``kv_quantization``). In 8 bits an entry
is written once, when nothing can change it any more; until then the newest entry of a head, which is open, lies beside
the blocks in the model's dtype, and its place in the blocks holds anything.

Legend: B sequences, G KV heads, D head dim, P entries per block.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PagedKV(NamedTuple):
    """Keys (rotated) and values of the head caches of some sequences in one layer."""

    k_blocks: Tensor
    """[blocks, P, D] pool of all sequences and layers, in the model's dtype, int8 or float8_e4m3fn."""
    v_blocks: Tensor
    k_scale: Tensor | None = None
    """float32 [blocks, P]: what an entry is multiplied by; None where blocks are not in 8 bits."""
    v_scale: Tensor | None = None
    k_open: Tensor | None = None
    """[B, G, D] open entry of each head in the model's dtype; None where entries are closed as soon as they come."""
    v_open: Tensor | None = None
    open_entry_BG: Tensor | None = None
    """int32 place of the open entry in its head cache, -1 where there is none."""

    @property
    def block_size(self) -> int:
        """Entries per block P."""
        return self.k_blocks.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels per head D."""
        return self.k_blocks.shape[2]

    @property
    def quantised(self) -> bool:
        """Whether the blocks are in 8 bits."""
        return self.k_scale is not None

    def of_rows(self, rows: Tensor | slice | int | tuple[int, Tensor]) -> PagedKV:
        """The same with the open entries of the given rows alone, or of (layer, rows) where it has them by layer."""
        if self.k_open is None or self.v_open is None or self.open_entry_BG is None:
            return self
        k_open, v_open, open_entry_BG = (x[rows] for x in (self.k_open, self.v_open, self.open_entry_BG))
        return self._replace(k_open=k_open, v_open=v_open, open_entry_BG=open_entry_BG)

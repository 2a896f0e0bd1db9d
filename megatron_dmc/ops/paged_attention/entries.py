"""Reading entries of head caches from blocks, as the model's numbers.

Legend: B sequences, G KV heads, E entries, D head dim, M blocks per head cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.kv_quantization import dequantise
from megatron_dmc.ops.paged_kv import PagedKV


def entry_slots(block_table_BGM: Tensor, entry_BGE: Tensor, block_size: int) -> Tensor:
    """int64 [B, G, E]: where in the flattened pool the given entries of each head cache lie."""
    block_BGE = block_table_BGM.gather(-1, entry_BGE // block_size).long()
    return block_BGE * block_size + entry_BGE % block_size


def read_keys(kv: PagedKV, block_table_BGM: Tensor, entry_BGE: Tensor, dtype: torch.dtype) -> Tensor:
    """Rotated keys [B, G, E, D] of the entries at places ``entry_BGE`` (int64) of each head cache.

    ``dtype`` is what quantised keys become; others keep their own.
    """
    return _read(kv.k_blocks, kv.k_scale, kv.k_open, kv.open_entry_BG, block_table_BGM, entry_BGE, dtype)


def read_values(kv: PagedKV, block_table_BGM: Tensor, entry_BGE: Tensor, dtype: torch.dtype) -> Tensor:
    """Values, as :func:`read_keys`."""
    return _read(kv.v_blocks, kv.v_scale, kv.v_open, kv.open_entry_BG, block_table_BGM, entry_BGE, dtype)


def _read(
    blocks: Tensor,
    scale: Tensor | None,
    open_BGD: Tensor | None,
    open_entry_BG: Tensor | None,
    block_table_BGM: Tensor,
    entry_BGE: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    slot_BGE = entry_slots(block_table_BGM, entry_BGE, blocks.shape[1])
    # On a CPU this reads rows three times as fast as indexing does.
    found_BGED = F.embedding(slot_BGE, blocks.flatten(0, 1))
    if scale is None:
        return found_BGED
    found_BGED = dequantise(found_BGED, scale.flatten()[slot_BGE], dtype)
    if open_BGD is None or open_entry_BG is None:
        return found_BGED
    is_open_BGE = entry_BGE == open_entry_BG.unsqueeze(-1)
    return torch.where(is_open_BGE.unsqueeze(-1), open_BGD.unsqueeze(2).to(dtype), found_BGED)

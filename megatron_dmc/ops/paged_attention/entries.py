"""Entries of head caches in their blocks: read and written as the model's numbers.

Legend: B sequences, G KV heads, E entries, X entries of any head caches, D head dim, M blocks per head
cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.kv_quantization import dequantise, format_of, quantise
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


def write_entries(kv: PagedKV, slot_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
    """Store closed entries at places of the flattened pool (int64, each once), in 8 bits where the pool is."""
    for x_XD, blocks, scale in ((k_XD, kv.k_blocks, kv.k_scale), (v_XD, kv.v_blocks, kv.v_scale)):
        if scale is None:
            blocks.flatten(0, 1)[slot_X] = x_XD.to(blocks.dtype)
        else:
            blocks.flatten(0, 1)[slot_X], scale.view(-1)[slot_X] = quantise(x_XD, format_of(blocks.dtype))


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
    # On a CPU an embedding reads rows three times as fast as indexing does.
    if scale is None:
        return F.embedding(slot_BGE, blocks.flatten(0, 1))
    stored_BGED = F.embedding(slot_BGE, blocks.flatten(0, 1).view(torch.int8)).view(blocks.dtype)
    found_BGED = dequantise(stored_BGED, scale.flatten()[slot_BGE], dtype)
    if open_BGD is None or open_entry_BG is None:
        return found_BGED
    is_open_BGE = entry_BGE == open_entry_BG.unsqueeze(-1)
    return torch.where(is_open_BGE.unsqueeze(-1), open_BGD.unsqueeze(2).to(dtype), found_BGED)

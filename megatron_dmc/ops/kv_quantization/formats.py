"""What an entry of the cache may be stored as."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SMALLEST = 1e-30
"""Largest magnitude of an entry that still counts: below it, every channel is stored as 0 and no scale underflows."""


@dataclass(frozen=True)
class KVFormat:
    """How the keys and values of closed entries are stored.

    Args:
        name: as users know it (``--kv-dtype``).
        dtype: of the stored numbers; None is the model's, without scales.
        largest: the stored number that the largest magnitude of an entry becomes.
    """

    name: str
    dtype: torch.dtype | None = None
    largest: float = 1.0

    def block_bytes(self, block_size: int, head_dim: int, model_dtype: torch.dtype) -> int:
        """Bytes of one block: keys, values and their scales."""
        if self.dtype is None:
            return 2 * block_size * head_dim * model_dtype.itemsize
        return 2 * block_size * (head_dim * self.dtype.itemsize + torch.float32.itemsize)

    def open_entry_bytes(self, head_dim: int, model_dtype: torch.dtype) -> int:
        """Bytes that one head keeps for its open entry: key, value and place. 0 where the blocks hold it."""
        return 0 if self.dtype is None else 2 * head_dim * model_dtype.itemsize + torch.int32.itemsize


AUTO = KVFormat("auto")
"""As the model computes."""

KV_FORMATS = {
    kv_format.name: kv_format
    for kv_format in (
        AUTO,
        KVFormat("fp8", torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max),
        # Symmetric: -128 is not used.
        KVFormat("int8", torch.int8, 127.0),
    )
}
"""By name."""


def find_kv_format(name: str) -> KVFormat:
    """The format that users call ``name``.

    Raises:
        ValueError: an unknown name.
    """
    if name not in KV_FORMATS:
        raise ValueError(f"kv_dtype={name!r}: must be one of {', '.join(KV_FORMATS)} (auto = as the model)")
    return KV_FORMATS[name]


def format_of(dtype: torch.dtype) -> KVFormat:
    """The format that stores numbers of ``dtype``."""
    return next((kv_format for kv_format in KV_FORMATS.values() if kv_format.dtype == dtype), AUTO)

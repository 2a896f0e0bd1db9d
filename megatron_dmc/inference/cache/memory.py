"""Memory for the pool: how much there is, and on a CPU zeros that take none before they are written."""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from megatron_dmc.support.units import binary_bytes

GPU_SHARE = 0.9
"""Of the free memory of a GPU; the rest is for what a pass computes."""


def available_bytes(device: torch.device) -> int:
    """Bytes that a pool may take: a share of what a GPU has free, or all memory of the machine."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. On a CPU it is an address range at first: pages become memory when they are written.

    So a pool may be as large as its sequences could ever need, costs what they use, and never has to grow.

    Raises:
        ValueError: the system does not give so large a range.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = max(torch.Size(shape).numel() * dtype.itemsize, 1)
    try:
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ValueError(
            f"no address range of {binary_bytes(num_bytes)} for the cache ({error}): give the number of its blocks, "
            "decode fewer sequences at once, or raise the limit (ulimit -v)"
        ) from None
    return torch.frombuffer(pages, dtype=torch.uint8).view(dtype).view(shape)

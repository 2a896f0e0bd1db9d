"""Bytes of files read into the memory of tensors. Describing a checkpoint does not need it, and so loads no torch."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.support.files import open_regular


def read_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """``shape`` elements at ``offset`` of a file, in memory of their own; the file's pages are not kept in memory.

    Raises:
        ValueError: the file ends before.
    """
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel() == 0:
        return tensor
    with open_regular(path) as stream:
        raw = stream.raw  # type: ignore[attr-defined]  # past the buffer: tensors are large
        raw.seek(offset)
        fill(tensor, raw, f"{path} is truncated: it ends inside a tensor behind byte {offset}")
        os.posix_fadvise(stream.fileno(), offset, tensor.nbytes, os.POSIX_FADV_DONTNEED)
    return tensor


def fill(tensor: torch.Tensor, stream: Any, truncated: str) -> None:
    """Read a contiguous tensor's bytes from where a stream stands; ``ValueError(truncated)`` where it ends before."""
    view = tensor_memory(tensor)
    done = 0
    while done < len(view):
        count = stream.readinto(view[done:])
        if not count:
            raise ValueError(truncated)
        done += count


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, in place; the tensor lives as long as the view.

    Not through numpy, which would pin the storage: a converter wants to free it early.
    """
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    array.tensor = tensor  # type: ignore[attr-defined]
    return memoryview(array).cast("B")

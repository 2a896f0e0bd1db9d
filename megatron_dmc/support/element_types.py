"""The types of tensor elements by name and size: what describes tensors needs no torch, which is slow to load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ElementType:
    """A type of elements: ``name`` as torch calls it, without ``torch.``; ``itemsize`` in bytes."""

    name: str
    itemsize: int

    @property
    def dtype(self) -> torch.dtype:
        """The same for torch, which is loaded here."""
        import torch

        dtype = getattr(torch, self.name)
        assert dtype.itemsize == self.itemsize
        return dtype

    def __str__(self) -> str:
        return self.name


ELEMENT_TYPES = {
    name: ElementType(name, itemsize)
    for itemsize, names in {
        8: ("float64", "int64"),
        4: ("float32", "int32"),
        2: ("float16", "bfloat16", "int16"),
        1: ("int8", "uint8", "bool"),
    }.items()
    for name in names
}
"""Those that a checkpoint may hold, by name."""

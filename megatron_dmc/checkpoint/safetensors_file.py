"""The header of a safetensors file, checked, and its tensors read one at a time without mapping the file.

Format: 8 bytes little-endian length of the header, the header as JSON, the data without gaps.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.bounded import read_exactly
from megatron_dmc.checkpoint.torch_file import StoredTensor
from megatron_dmc.support.element_types import ELEMENT_TYPES, ElementType
from megatron_dmc.support.files import open_regular, parse_json

HEADER_BYTES_LIMIT = 100_000_000
"""The limit of the format's own implementation."""
_DIMENSIONS_LIMIT = 8

DTYPES: dict[str, ElementType] = {
    "F64": ELEMENT_TYPES["float64"],
    "F32": ELEMENT_TYPES["float32"],
    "F16": ELEMENT_TYPES["float16"],
    "BF16": ELEMENT_TYPES["bfloat16"],
    "I64": ELEMENT_TYPES["int64"],
    "I32": ELEMENT_TYPES["int32"],
    "I16": ELEMENT_TYPES["int16"],
    "I8": ELEMENT_TYPES["int8"],
    "U8": ELEMENT_TYPES["uint8"],
    "BOOL": ELEMENT_TYPES["bool"],
}
DTYPE_NAMES = {element_type.name: name for name, element_type in DTYPES.items()}


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file holds."""

    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_safetensors_header(path: Path) -> SafetensorsHeader:
    """Check and read the header of a safetensors file.

    Raises:
        ValueError: truncated, a header that is not the format's, an unknown type, or offsets that overlap, leave
            gaps, contradict the shape or exceed the file.
    """
    with open_regular(path) as stream:
        file_bytes = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(read_exactly(stream, 0, 8, str(path)), "little")
        if length > min(HEADER_BYTES_LIMIT, file_bytes - 8):
            raise ValueError(f"{path}: a header of {length} bytes is announced, the file has {file_bytes}")
        header = parse_json(read_exactly(stream, 8, length, str(path)), f"the header of {path}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map names to strings")
    start, tensors, ranges = 8 + length, {}, []
    for name, entry in header.items():
        element_type, shape, begin, end = _entry(path, name, entry)
        if end - begin != math.prod(shape) * element_type.itemsize:
            raise ValueError(
                f"{path}: {name} has {end - begin} bytes, its shape {shape} of {element_type} needs another number"
            )
        ranges.append((begin, end, name))
        tensors[name] = StoredTensor(path, start + begin, element_type, shape)
    expected = 0
    for begin, end, name in sorted(ranges):
        if begin != expected:
            raise ValueError(f"{path}: {name} starts at byte {begin} of the data, {expected} is expected")
        expected = end
    if start + expected != file_bytes:
        raise ValueError(
            f"{path} has {file_bytes} bytes, its header announces {start + expected}: damaged or truncated"
        )
    return SafetensorsHeader(tensors, metadata)


def _entry(path: Path, name: str, entry: Any) -> tuple[ElementType, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: {name} needs dtype, shape and data_offsets, it has {entry!r:.200}")
    element_type = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if element_type is None:
        raise ValueError(f"{path}: {name} is of type {entry['dtype']!r:.50}; known are {', '.join(DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    for numbers, limit in ((shape, _DIMENSIONS_LIMIT), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > limit:
            raise ValueError(f"{path}: {name} has a shape or offsets that are not short lists")
        if any(type(number) is not int or not 0 <= number < 1 << 62 for number in numbers):
            raise ValueError(f"{path}: {name} has sizes or offsets that are not counts")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{path}: {name} has data_offsets {offsets}")
    return element_type, tuple(shape), offsets[0], offsets[1]

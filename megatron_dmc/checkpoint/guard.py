"""The check that stands before torch or Megatron opens a checkpoint.

Megatron opens ``.metadata`` with plain ``pickle.load`` and the objects inside ``.distcp`` with
``torch.load(weights_only=False)``: whoever wrote the checkpoint could run code. This module walks every pickle that
would be opened, without opening any, and refuses what no checkpoint needs. It reads headers and pickles, not tensor
data: seconds for any size.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, Location, locate
from megatron_dmc.checkpoint.pickles import Record, describe
from megatron_dmc.checkpoint.torch_dist import Item, TorchDistCheckpoint
from megatron_dmc.checkpoint.torch_file import PICKLE_BYTES_LIMIT, StoredTensor, read_torch_file, read_torch_item

_ZIP_MAGIC = b"PK\x03\x04"
# Transformer Engine unpickles the bytes of these tensors.
_EXTRA_STATE = "_extra_state"


def check_checkpoint(path: Path | str) -> int:
    """Scan every pickle that torch or Megatron would open in a checkpoint; the number of pickles scanned.

    Args:
        path: a ``--save`` directory, one iteration in it, or a Hugging Face directory (nothing to scan).

    Raises:
        ValueError: damaged, incomplete, or a pickle that imports what no checkpoint needs; the message names it.
    """
    location = locate(path)
    if location.format == HUGGING_FACE:
        return 0
    return _check_legacy(location) if location.format == LEGACY else _check_torch_dist(location.directory)


def _check_torch_dist(directory: Path) -> int:
    checkpoint = TorchDistCheckpoint(directory)
    scanned = 1
    for path in sorted(directory.glob("*.pt")):
        _check_nested(read_torch_file(path), str(path))
        scanned += 1
    items = list(checkpoint.objects.items())
    items += [(name, chunk.item) for name, tensor in checkpoint.tensors.items() for chunk in tensor.chunks]
    by_file: dict[Path, list[tuple[str, Item]]] = {}
    for name, item in items:
        by_file.setdefault(item.path, []).append((name, item))
    for path, entries in by_file.items():
        with open(path, "rb") as stream:
            for name, item in sorted(entries, key=lambda entry: entry[1].offset):
                content = item.describe(stream)
                if name in checkpoint.tensors:
                    if not isinstance(content, StoredTensor):
                        raise ValueError(f"{path} at {item.offset} holds a {type(content).__name__}, not {name}")
                else:
                    _check_nested(content, f"{name} in {path}", is_extra_state=_EXTRA_STATE in name)
                scanned += 1
    return scanned


def _check_legacy(location: Location) -> int:
    ranks = LegacyCheckpoint(location.directory).paths.values()
    paths = sorted(path for rank in ranks for path in rank.parent.glob("*.pt"))
    for path in paths:
        _check_nested(read_torch_file(path), str(path))
    return len(paths)


def _check_nested(value: Any, what: str, is_extra_state: bool = False) -> None:
    """Scan the pickles that Transformer Engine keeps inside values: bytes in a file object or in a tensor."""
    pending, seen = [(value, is_extra_state)], set()
    while pending:
        value, is_extra_state = pending.pop()
        if isinstance(value, StoredTensor):
            if is_extra_state and value.nbytes:
                _check_bytes(_bytes_of(value, what), what)
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Record):
            if value.kind == "_io.BytesIO" and isinstance(value.state, tuple):
                _check_bytes(value.state[0], what)
            pending += [(value.args, is_extra_state), (value.state, is_extra_state)]
        elif isinstance(value, dict):
            pending += [(entry, is_extra_state or _EXTRA_STATE in str(name)) for name, entry in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(entry, is_extra_state) for entry in value]


def _check_bytes(data: Any, what: str) -> None:
    if not isinstance(data, bytes):
        raise ValueError(f"{what}: a file object that holds a {type(data).__name__}")
    if not data:
        return
    what = f"the state of Transformer Engine in {what}"
    if data.startswith(_ZIP_MAGIC):
        read_torch_item(Path(what), io.BytesIO(data), 0, len(data), what)
    else:
        describe(data, what, ALLOWED)


def _bytes_of(tensor: StoredTensor, what: str) -> bytes:
    if tensor.nbytes > PICKLE_BYTES_LIMIT:
        raise ValueError(f"{what} holds {tensor.nbytes} bytes of Transformer Engine's state")
    return tensor.read().flatten().view(torch.uint8).numpy().tobytes()

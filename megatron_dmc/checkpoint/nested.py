"""Pickles inside the values of a checkpoint: Transformer Engine keeps its states as bytes, and unpickles them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.allowed import ALLOWED
from megatron_dmc.checkpoint.pickles import Record, describe
from megatron_dmc.checkpoint.torch_file import PICKLE_BYTES_LIMIT, StoredTensor, read_torch_item

EXTRA_STATE = "_extra_state"
"""In the name of a value that Transformer Engine unpickles the bytes of."""
_ZIP_MAGIC = b"PK\x03\x04"


def check_nested(value: Any, what: str, is_extra_state: bool = False) -> None:
    """Describe the pickles inside a described value: bytes in a file object, or in a tensor of an extra state.

    Raises:
        ValueError: one of them holds what no checkpoint needs.
    """
    pending, seen = [(value, is_extra_state)], set()
    while pending:
        value, is_extra_state = pending.pop()
        if isinstance(value, StoredTensor):
            if is_extra_state and value.nbytes:
                _check_bytes(_bytes_of(value, what), what)
            continue
        if (id(value), is_extra_state) in seen:
            continue
        seen.add((id(value), is_extra_state))
        if isinstance(value, Record):
            if value.kind == "_io.BytesIO" and value.state is not None:
                _check_bytes(value.state[0], what)
            pending += [(part, is_extra_state) for part in value.parts]
        elif isinstance(value, dict):
            pending += [(entry, is_extra_state or EXTRA_STATE in str(name)) for name, entry in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            pending += [(entry, is_extra_state) for entry in value]


def _check_bytes(data: bytes, what: str) -> None:
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
    return tensor.read_bytes()

"""The globals that a pickle in a checkpoint may mention, and what stands for each when it is read.

Collected from what torch 2.1 to 2.15, Megatron core 0.16 to 0.19 and Transformer Engine write. Every entry is an
enumeration, a plain data class, a container or a number type: calling it has no effect outside the value. Arguments
and states are limited to what their own pickles hold, so that no entry can be made to take memory, open a file or
import a module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from megatron_dmc.checkpoint.pickles import Name, OrderedMapping, Record, Refused, checked_members
from megatron_dmc.support.element_types import ELEMENT_TYPES, ElementType

_NUMBERS = re.compile(r"[biufc][0-9]{1,2}|\?")
_TEXT_LIMIT = 4096
_FILE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")


def _size(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or any(type(value) is not int for value in values):
        raise Refused("a torch.Size of something else than integers")
    return tuple(values)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise Refused("bytes in another encoding than latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Protocol 2 writes empty bytes as a call without arguments."""
    return b""


def _layout(name: Any) -> str:
    if name != "torch.strided":
        raise Refused("a tensor layout that is not torch.strided")
    return "strided"


def _ordered() -> OrderedMapping:
    """Its items come afterwards, one by one."""
    return OrderedMapping()


def _set(values: Any = ()) -> set[Any]:
    return set(_members(values))


def _frozenset(values: Any = ()) -> frozenset[Any]:
    return frozenset(_members(values))


def _members(values: Any) -> Any:
    if type(values) not in (list, tuple):
        raise Refused(f"a set made from a {type(values).__name__}")
    return checked_members(values)


def _device(kind: Any, index: Any = 0) -> Record:
    if type(kind) is not str or type(index) is not int:
        raise Refused("a torch.device made from something else than a name and a number")
    return Record("torch.device", (kind, index))


def _array(kind: Any, shape: Any, code: Any) -> Record:
    if not isinstance(kind, Name) or kind.name != "numpy.ndarray" or shape != (0,) or code != b"b":
        raise Refused("a numpy array made from something else than nothing")
    return Record("numpy.ndarray", accepts=_is_array_state)


def _is_array_state(state: Any) -> bool:
    """Version, shape, element type, order, bytes: an array of numbers whose bytes are there."""
    if type(state) is not tuple or len(state) != 5 or state[0] != 1 or type(state[3]) is not bool:
        return False
    shape, kind, data = state[1], state[2], state[4]
    if not _are(shape, int) or not isinstance(kind, Record) or type(data) is not bytes or kind.kind != "numpy.dtype":
        return False
    item_bytes = int(kind.args[0][1:] or 1)
    return min(shape, default=0) >= 0 and math.prod(shape) * item_bytes == len(data)


def _number_type(code: Any, align: Any = False, copy: Any = True) -> Record:
    if type(code) is not str or not _NUMBERS.fullmatch(code) or type(align) is not bool or type(copy) is not bool:
        raise Refused("a numpy type that is not one of numbers")
    return Record("numpy.dtype", (code,), accepts=lambda state: state in _BYTE_ORDERS)


_BYTE_ORDERS = tuple((3, order, None, None, None, -1, -1, 0) for order in "<|")


def _file_object() -> Record:
    return Record("_io.BytesIO", accepts=_is_file_state)


def _is_file_state(state: Any) -> bool:
    """Content, position, attributes."""
    if type(state) is not tuple or len(state) != 3 or type(state[0]) is not bytes or state[2] is not None:
        return False
    return type(state[1]) is int and 0 <= state[1] <= len(state[0])


def _path(kind: str) -> Callable[..., Record]:
    def build(*parts: Any) -> Record:
        if not _are(parts, str) or sum(map(len, parts)) > _TEXT_LIMIT:
            raise Refused(f"a {kind} made from something else than short texts")
        return Record(kind, parts)

    return build


def _member(kind: str) -> Callable[..., Record]:
    """A member of an enumeration, by its value."""

    def build(value: Any) -> Record:
        if type(value) not in (int, str):
            raise Refused(f"a {kind} that is neither a number nor a text")
        return Record(kind, (value,))

    return build


def _data(kind: str, accepts: Callable[[Any], bool] | None = None, is_key: bool = False) -> Callable[..., Record]:
    """An object made without arguments, whose attributes are set afterwards."""

    def build() -> Record:
        return Record(kind, accepts=accepts or _are_attributes, is_key=is_key)

    return build


def _are(values: Any, kind: type) -> bool:
    return type(values) is tuple and all(type(value) is kind for value in values)


def _are_attributes(state: Any) -> bool:
    return type(state) is dict and all(type(name) is str for name in state)


def _is_index(state: Any) -> bool:
    if not _are_attributes(state) or not state.keys() <= {"fqn", "offset", "index"}:
        return False
    offset, index = state.get("offset"), state.get("index")
    return type(state.get("fqn")) is str and (offset is None or _are(offset, int)) and type(index) in (int, type(None))


def _is_storage_info(state: Any) -> bool:
    """A range of a plain file name: never a path out of the checkpoint, never a transformation."""
    if not _are_attributes(state) or state.get("transform_descriptors"):
        return False
    name, numbers = state.get("relative_path"), (state.get("offset"), state.get("length"))
    return type(name) is str and _FILE_NAME.fullmatch(name) is not None and _are(numbers, int) and min(numbers) >= 0


def _are_properties(state: Any) -> bool:
    """Of a tensor: type, layout, whether it needs a gradient, memory format, whether it is pinned, strides."""
    if type(state) is not tuple or len(state) not in (5, 6) or not isinstance(state[0], Name):
        return False
    return state[5:] in ((), (None,)) or _are(state[5], int)


_METADATA = "torch.distributed.checkpoint.metadata."
_PLANNER = "torch.distributed.checkpoint.planner."
_STRATEGIES = "megatron.core.dist_checkpointing.strategies."

_ENUMERATIONS = f"""
    signal.Signals
    {_METADATA}_MEM_FORMAT_ENCODING
    {_PLANNER}WriteItemType
    megatron.core.enums.ModelType megatron.core.transformer.enums.ModelType
    megatron.core.enums.Fp8Recipe megatron.core.enums.Fp4Recipe
    megatron.core.transformer.enums.AttnBackend
    megatron.core.transformer.enums.AttnMaskType
    megatron.core.transformer.enums.CudaGraphModule
    megatron.core.transformer.enums.CudaGraphScope
    megatron.core.transformer.enums.InferenceCudaGraphScope
    megatron.core.transformer.enums.LayerType
    megatron.core.rerun_state_machine.RerunDiagnostic
    megatron.core.rerun_state_machine.RerunMode
    megatron.core.rerun_state_machine.RerunState
""".split()

_DATA = f"""
    argparse.Namespace
    types.SimpleNamespace
    {_METADATA}Metadata
    {_METADATA}TensorStorageMetadata
    {_METADATA}BytesStorageMetadata
    {_METADATA}ChunkStorageMetadata
    {_METADATA}StorageMeta
    torch.distributed.checkpoint.filesystem._StoragePrefix
    {_PLANNER}SavePlan
    {_PLANNER}WriteItem
    {_PLANNER}TensorWriteData
    {_PLANNER}BytesIOWriteData
    megatron.core.optimizer.optimizer_config.OptimizerConfig
    {_STRATEGIES}torch.MCoreMetadata
    {_STRATEGIES}torch.MCoreSavePlan
    {_STRATEGIES}cached_metadata_filesystem_reader.MCoreMetadata
""".split()

_PATHS = "pathlib.Path pathlib.PosixPath pathlib._local.Path pathlib._local.PosixPath".split()  # noqa: SIM905

DTYPES: dict[str, ElementType] = {f"torch.{name}": element_type for name, element_type in ELEMENT_TYPES.items()}

STORAGE_DTYPES: dict[str, ElementType] = {
    f"torch.{storage}Storage": ELEMENT_TYPES[name]
    for storage, name in {
        "Double": "float64",
        "Float": "float32",
        "Half": "float16",
        "BFloat16": "bfloat16",
        "Long": "int64",
        "Int": "int32",
        "Short": "int16",
        "Char": "int8",
        "Byte": "uint8",
        "Bool": "bool",
    }.items()
}

ALLOWED: dict[str, Callable[..., Any] | None] = {
    **{name: _member(name) for name in _ENUMERATIONS},
    **{name: _data(name) for name in _DATA},
    **{name: _path(name) for name in _PATHS},
    _METADATA + "MetadataIndex": _data(_METADATA + "MetadataIndex", _is_index, is_key=True),
    _METADATA + "TensorProperties": _data(_METADATA + "TensorProperties", _are_properties),
    "torch.distributed.checkpoint.filesystem._StorageInfo": _data(
        "torch.distributed.checkpoint.filesystem._StorageInfo", _is_storage_info
    ),
    **dict.fromkeys((*DTYPES, *STORAGE_DTYPES)),
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _encode,
    "_io.BytesIO": _file_object,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "builtins.frozenset": _frozenset,
    "__builtin__.frozenset": _frozenset,
    "numpy.ndarray": None,
    "numpy.dtype": _number_type,
    "numpy.dtypes.UInt32DType": None,
    "numpy.core.multiarray._reconstruct": _array,
    "numpy._core.multiarray._reconstruct": _array,
}

"""The globals that a pickle in a checkpoint may mention, and what stands for each when it is read.

Collected from what torch 2.10 to 2.15, Megatron core 0.16 to 0.19 and Transformer Engine write. Every entry is an
enumeration, a plain data class, a container or a number type: calling it has no effect outside the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_dmc.checkpoint.pickles import OrderedMapping, Record


def _size(values: Any = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or any(type(value) is not int for value in values):
        raise ValueError("a torch.Size of something else than integers")
    return tuple(values)


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise ValueError(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    """Protocol 2 writes empty bytes as a call without arguments."""
    return b""


def _layout(name: Any) -> str:
    if name != "torch.strided":
        raise ValueError(f"a tensor layout {name!r}")
    return "strided"


def _empty_array(kind: Any, shape: Any, code: Any) -> Record:
    if shape != (0,) or code != b"b":
        raise ValueError(f"a numpy array made from {shape!r}, {code!r}")
    return Record("numpy.ndarray")


def _record(kind: str) -> Callable[..., Record]:
    def build(*arguments: Any) -> Record:
        return Record(kind, arguments)

    return build


_RECORDS = """
    _io.BytesIO
    argparse.Namespace
    types.SimpleNamespace
    pathlib.Path pathlib.PosixPath pathlib._local.Path pathlib._local.PosixPath
    signal.Signals
    numpy.ndarray numpy.dtype numpy.dtypes.UInt32DType
    torch.device
    torch.distributed.checkpoint.metadata.Metadata
    torch.distributed.checkpoint.metadata.MetadataIndex
    torch.distributed.checkpoint.metadata.TensorStorageMetadata
    torch.distributed.checkpoint.metadata.BytesStorageMetadata
    torch.distributed.checkpoint.metadata.ChunkStorageMetadata
    torch.distributed.checkpoint.metadata.TensorProperties
    torch.distributed.checkpoint.metadata.StorageMeta
    torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    torch.distributed.checkpoint.filesystem._StorageInfo
    torch.distributed.checkpoint.filesystem._StoragePrefix
    torch.distributed.checkpoint.planner.SavePlan
    torch.distributed.checkpoint.planner.WriteItem
    torch.distributed.checkpoint.planner.WriteItemType
    torch.distributed.checkpoint.planner.TensorWriteData
    torch.distributed.checkpoint.planner.BytesIOWriteData
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
    megatron.core.optimizer.optimizer_config.OptimizerConfig
    megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata
    megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan
    megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader.MCoreMetadata
"""

DTYPES: dict[str, torch.dtype] = {
    f"torch.{name}": getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()  # noqa: SIM905
}

STORAGE_DTYPES: dict[str, torch.dtype] = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

ALLOWED: dict[str, Callable[..., Any] | None] = {
    **{name: _record(name) for name in _RECORDS.split()},
    **dict.fromkeys((*DTYPES, *STORAGE_DTYPES)),
    "torch.Size": _size,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": OrderedMapping,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "__builtin__.bytes": _no_bytes,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    "numpy.core.multiarray._reconstruct": _empty_array,
    "numpy._core.multiarray._reconstruct": _empty_array,
}

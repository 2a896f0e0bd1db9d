"""Megatron's legacy layout, written: one ``torch.save`` file per rank, filled tensor by tensor.

torch writes each file once without the tensors' bytes (``torch.serialization.skip_data``); the bytes are then put
where the file expects them. So no rank is ever held in memory.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dmc.checkpoint.legacy import FILE_NAME, rank_directory
from megatron_dmc.checkpoint.tensor_memory import tensor_memory
from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.tensors import EMBEDDING, EXTRA_STATE_MODULES, LOCAL_SPEC_NAMES, OUTPUT_LAYER, Entry, entries
from megatron_dmc.support.progress import Advance

LOCAL, TRANSFORMER_ENGINE = "local", "transformer_engine"


@dataclass(frozen=True)
class LegacyCut:
    """How a model is cut into rank files.

    ``chunks[pipeline rank][virtual stage]`` are the layers of each model chunk; ``transformer_impl`` is Megatron's
    flag: the two implementations name the norms differently.
    """

    tensor_size: int
    chunks: list[list[range]]
    transformer_impl: str = TRANSFORMER_ENGINE

    @property
    def pipeline_size(self) -> int:
        """Pipeline ranks."""
        return len(self.chunks)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is kept: pipeline rank, key of the chunk in the file, name in the chunk."""

    pipeline_rank: int
    chunk: str
    name: str


def write_legacy(
    directory: Path,
    shape: MegatronShape,
    arguments: dict[str, Any],
    read: Callable[[Entry], Tensor],
    cut: LegacyCut,
    advance: Advance | None = None,
) -> None:
    """Write ``mp_rank_*`` files below ``directory``; ``read`` gives Megatron's tensor for an entry, once for each."""
    places = {entry: list(_places(entry, shape, cut)) for entry in entries(shape.config)}
    files = _write_frames(directory, shape, arguments, places, cut)
    for entry, kept_at in places.items():
        whole = read(entry)
        for rank, shard in enumerate(entry.row.layout.shard(whole, cut.tensor_size)):
            shard = shard.contiguous()
            for place in kept_at:
                stored = files[rank, place.pipeline_rank][place.chunk][place.name]
                _fill(stored, shard)
                if advance is not None:
                    advance(shard.nbytes)
        del whole, shard


def _places(entry: Entry, shape: MegatronShape, cut: LegacyCut) -> Iterator[_Place]:
    virtual = len(cut.chunks[0])
    keys = ["model"] if virtual == 1 else [f"model{stage}" for stage in range(virtual)]
    last = cut.pipeline_size - 1
    if entry.layer is None:
        if entry.row.megatron == EMBEDDING:
            yield _Place(0, keys[0], entry.megatron_name)
            if shape.config.tie_word_embeddings and last > 0:
                yield _Place(last, keys[-1], OUTPUT_LAYER)  # the last stage holds a copy of a tied embedding
        else:
            yield _Place(last, keys[-1], entry.megatron_name)
        return
    for rank, of_rank in enumerate(cut.chunks):
        for key, layers in zip(keys, of_rank, strict=True):
            if entry.layer in layers:
                yield _Place(rank, key, _name_in_chunk(entry, entry.layer - layers.start, cut.transformer_impl))


def _name_in_chunk(entry: Entry, local_layer: int, transformer_impl: str) -> str:
    name = entry.row.megatron.replace("*", str(local_layer))
    if transformer_impl == LOCAL:
        for local, shared in LOCAL_SPEC_NAMES.items():
            name = name.replace(shared, local)
    return name


def _write_frames(
    directory: Path,
    shape: MegatronShape,
    arguments: dict[str, Any],
    places: dict[Entry, list[_Place]],
    cut: LegacyCut,
) -> dict[tuple[int, int], dict[str, dict[str, StoredTensor]]]:
    """Write every rank's file without data; what each holds, by tensor and pipeline rank."""
    files = {}
    dtype = getattr(torch, shape.config.dtype)
    for rank in range(cut.tensor_size):
        for pipeline_rank in range(cut.pipeline_size):
            state: dict[str, Any] = {"args": Namespace(**arguments), "checkpoint_version": 3.0, "iteration": 0}
            with FakeTensorMode():
                for entry, kept_at in places.items():
                    whole = torch.empty(entry.megatron_shape(shape), dtype=dtype)
                    for place in kept_at:
                        if place.pipeline_rank == pipeline_rank:
                            shard = entry.row.layout.shard(whole, cut.tensor_size)[rank].clone()
                            state.setdefault(place.chunk, {})[place.name] = shard
            if cut.transformer_impl == TRANSFORMER_ENGINE:
                _add_extra_states(state)
            path = directory / rank_directory(rank, pipeline_rank, cut.pipeline_size) / FILE_NAME
            path.parent.mkdir(parents=True)
            with torch.serialization.skip_data(materialize_fake_tensors=True):
                torch.save(state, path)
            files[rank, pipeline_rank] = read_torch_file(path)
    return files


def _add_extra_states(state: dict[str, Any]) -> None:
    """Transformer Engine keeps a state of low-precision training beside its weights; here it is empty."""
    for key, chunk in state.items():
        if key.startswith("model"):
            layers = len({name.split(".")[2] for name in chunk if name.startswith("decoder.layers.")})
            for module in EXTRA_STATE_MODULES:
                chunk |= {f"{module.replace('*', str(layer))}._extra_state": None for layer in range(layers)}


def _fill(stored: StoredTensor, tensor: Tensor) -> None:
    assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
    view = tensor_memory(tensor)
    descriptor = os.open(stored.path, os.O_WRONLY)
    try:
        done = 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], stored.offset + done)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, stored.offset, done, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)

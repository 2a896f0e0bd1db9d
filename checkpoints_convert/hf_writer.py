"""Any model source, written as a Hugging Face directory: safetensors in shards, index, configuration, tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_convert.model_card import CardFacts, model_card
from checkpoints_convert.options import Options
from checkpoints_convert.sizes import entry_bytes, itemsize, weight_bytes
from checkpoints_convert.streams import WRITER_THREADS, HashedFile
from megatron_dmc.checkpoint import companions
from megatron_dmc.checkpoint.manifest import write_manifest
from megatron_dmc.checkpoint.safetensors_file import DTYPE_NAMES
from megatron_dmc.checkpoint.source import Source
from megatron_dmc.checkpoint.tensor_memory import tensor_memory
from megatron_dmc.checkpoint.weight_files import INDEX_NAME, SINGLE_NAME
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.tensors import Entry, entries
from megatron_dmc.support.files import new_directory, write_json, write_text
from megatron_dmc.support.progress import Advance, progress

SHARD_BYTES = 2_000_000_000
"""Size of a shard: several are written at one time, and even a 7B model should have enough of them."""
_HEADER_ALIGNMENT = 8


def write_hugging_face(
    source: Source,
    destination: Path,
    label: str,
    *,
    facts: CardFacts | None = None,
    tokenizer: Path | None = None,
    options: Options,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model with everything that ``from_pretrained`` needs, a model card and a manifest.

    Args:
        facts: what the card tells besides the shape of the model.
        tokenizer: Hugging Face directory or sentencepiece file; default: the companions of the source.
        check: called (unless the options say not to verify) with the complete directory before it takes its place;
            what it raises leaves nothing behind.

    Raises:
        ValueError: no tokenizer at the path, or a destination that exists.
    """
    if tokenizer is None and companions.has_tokenizer(source.companions):
        tokenizer = source.companions
    options.check_resources(MegatronShape(source.config, source.config.vocab_size), destination)
    with new_directory(destination, overwrite=options.overwrite) as partial:
        ids = companions.token_ids(source.companions) | companions.copy_tokenizer(tokenizer, partial)
        write_json(partial / "config.json", to_hf_config(source.config, source.dmc, **ids))
        with progress(label, weight_bytes(source.config), "B") as advance:
            hashes = write_weights(partial, source.config, source.parts, advance)
        write_text(partial / "README.md", model_card(destination.name, source.config, source.dmc, facts or CardFacts()))
        write_manifest(partial, hashes)
        if check is not None and options.verify:
            check(partial)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: the entries of the table whose tensors it will hold, in their order."""

    file_name: str
    entries: tuple[Entry, ...]


def plan_shards(config: ModelConfig, limit: int = SHARD_BYTES) -> list[Shard]:
    """Which tensors go into which file: in the order of the forward pass, files of at most ``limit`` bytes.

    Tensors that Megatron fuses stay together, so that each is read once; one entry may be larger than ``limit``.
    """
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries(config):
        size = entry_bytes(entry, config)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += size
    if len(groups) == 1:
        return [Shard(SINGLE_NAME, tuple(groups[0]))]
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_weights(
    directory: Path,
    config: ModelConfig,
    parts: Callable[[Entry], Sequence[Tensor]],
    advance: Advance | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:
    """Write every tensor of a model.

    Args:
        parts: gives the Hugging Face tensors of an entry; called once for each, by several threads.

    Returns:
        SHA-256 by file name.
    """
    shards = plan_shards(config, shard_bytes)
    with ThreadPoolExecutor(WRITER_THREADS) as threads:
        written = threads.map(lambda shard: _write_shard(directory, shard, config, parts, advance), shards)
        hashes = {shard.file_name: sha256 for shard, sha256 in zip(shards, written, strict=True)}
    if len(shards) > 1:
        weight_map = {name: shard.file_name for shard in shards for entry in shard.entries for name in entry.hf_names}
        write_json(directory / INDEX_NAME, {"metadata": {"total_size": weight_bytes(config)}, "weight_map": weight_map})
    return hashes


def _write_shard(
    directory: Path,
    shard: Shard,
    config: ModelConfig,
    parts: Callable[[Entry], Sequence[Tensor]],
    advance: Advance | None,
) -> str:
    dtype = getattr(torch, config.dtype)
    with HashedFile(directory / shard.file_name, advance) as stream:
        stream.write(_header(shard, config))
        for entry in shard.entries:
            for tensor, shape in zip(parts(entry), entry.hf_shapes(config), strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
                stream.write(tensor_memory(tensor.contiguous()))
                del tensor
    return stream.sha256()


def _header(shard: Shard, config: ModelConfig) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in shard.entries:
        for name, shape in zip(entry.hf_names, entry.hf_shapes(config), strict=True):
            end = offset + math.prod(shape) * itemsize(config)
            header[name] = {"dtype": DTYPE_NAMES[config.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text

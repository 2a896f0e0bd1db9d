"""Which files of a Hugging Face directory hold its weights, and what tensors are in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from megatron_dmc.checkpoint.safetensors_file import read_safetensors_header
from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file
from megatron_dmc.models.tensors import check_names
from megatron_dmc.support.files import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
WEIGHT_FILES = (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME)
"""In the order in which transformers looks for them."""

_ADAPTER = "adapter_config.json"
# Buffers that some releases of transformers saved; they follow from config.json.
_DERIVED = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|(cos|sin)_cached)|causal_mask|position_ids)")


class Weights(NamedTuple):
    """The tensors of a directory by name, whether from pickled files; what was chosen or passed over, in words."""

    tensors: dict[str, StoredTensor]
    pickled: bool
    notes: list[str]


def find_weights(directory: Path) -> Weights:
    """Every tensor of a directory that does not follow from its configuration.

    Raises:
        ValueError: no weights, an adapter to other weights, a damaged or hostile file, or an index that does not fit.
    """
    if (directory / _ADAPTER).is_file():
        raise ValueError(f"{directory} holds {_ADAPTER}: merge the adapter into its base model first")
    found = [name for name in WEIGHT_FILES if (directory / name).exists()]
    if not found:
        raise ValueError(f"{directory} holds no weights: none of {', '.join(WEIGHT_FILES)}")
    first, *others = found
    notes = [f"the weights of {first} are read, as transformers does, not those of {name}" for name in others]
    pickled = first in (PICKLED_NAME, PICKLED_INDEX_NAME)
    read = _read_pickled if pickled else _read_safetensors
    if first in (INDEX_NAME, PICKLED_INDEX_NAME):
        tensors = _read_shards(directory, first, read, notes)
    else:
        tensors = read(_weight_file(directory, first, notes))
    kept = {name: tensor for name, tensor in tensors.items() if not _DERIVED.fullmatch(name)}
    if len(kept) < len(tensors):
        notes.append(f"{len(tensors) - len(kept)} stored buffers are not read, they follow from config.json")
    return Weights(kept, pickled, notes)


def _read_shards(
    directory: Path, index: str, read: Callable[[Path], Mapping[str, StoredTensor]], notes: list[str]
) -> dict[str, StoredTensor]:
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / index} has no weight_map")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        inside = read(_weight_file(directory, shard, notes))
        listed = {name for name, file_name in weight_map.items() if file_name == shard}
        derived = {name for name in listed ^ inside.keys() if _DERIVED.fullmatch(name)}
        check_names(inside.keys() - derived, listed - derived, f"{directory / shard} (against the index)")
        tensors |= inside
    return tensors


def _weight_file(directory: Path, name: str, notes: list[str]) -> Path:
    """A file of the directory itself. A link that its owner put there is followed to a regular file, and told."""
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(f"{directory} names a file {name!r}: only plain file names of the same directory are allowed")
    path = (directory / name).resolve()
    if not path.is_file():
        raise ValueError(f"{directory / name} is missing or not a regular file")
    cache = path.parent.name == "blobs" and path.parent.parent == directory.resolve().parent.parent
    if path.parent != directory.resolve() and not cache:
        notes.append(f"{name} is a link to {path}")
    return path


def _read_safetensors(path: Path) -> dict[str, StoredTensor]:
    return read_safetensors_header(path).tensors


def _read_pickled(path: Path) -> dict[str, StoredTensor]:
    content = read_torch_file(path)
    if not isinstance(content, dict) or not all(isinstance(value, StoredTensor) for value in content.values()):
        raise ValueError(f"{path} is not a mapping of names to tensors")
    return {str(name): tensor for name, tensor in content.items()}

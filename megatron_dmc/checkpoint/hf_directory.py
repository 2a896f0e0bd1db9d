"""A Hugging Face model directory, read: configuration, index, shards, tokenizer files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from megatron_dmc.checkpoint.bounded import confined, read_json
from megatron_dmc.checkpoint.safetensors_file import read_safetensors_header
from megatron_dmc.checkpoint.torch_file import StoredTensor
from megatron_dmc.models.config import DTYPES
from megatron_dmc.models.hugging_face import parse_hf_config, read_config_json
from megatron_dmc.models.tensors import by_hf_name, check_names, hf_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# Buffers that old transformers saved; they follow from config.json.
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"


class HuggingFaceDirectory:
    """The files of a model as ``save_pretrained`` writes them.

    Attributes:
        config: shape of the model, with the type of its stored tensors.
        dmc: DMC settings, of a ``dmc_llama``.
        tensors: every tensor of the model by name.
        config_json: ``config.json`` as it stands.

    Raises:
        ValueError: an unsupported configuration, damaged files, missing, unknown or wrongly shaped tensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config_json = read_config_json(directory)
        config, self.dmc = parse_hf_config(self.config_json)
        found = {name: tensor for name, tensor in _all_tensors(directory).items() if not name.endswith(_IGNORED_SUFFIX)}
        embedding, head = hf_name(config, "embedding"), hf_name(config, "output")
        if config.tie_word_embeddings and head in found and embedding in found:
            _check_tied(head, found.pop(head), embedding, found[embedding])
        expected = by_hf_name(config)
        check_names(found, expected, str(directory))
        dtype = found[embedding].dtype
        for name, (entry, place) in expected.items():
            shape = entry.hf_shapes(config)[place]
            if found[name].shape != shape or found[name].dtype != dtype:
                raise ValueError(
                    f"{name} is {found[name].dtype} of shape {found[name].shape}: config.json and {embedding} ask for "
                    f"{dtype} of shape {shape}"
                )
        stored = str(dtype).removeprefix("torch.")
        if stored not in DTYPES:
            raise ValueError(f"{directory} stores {stored}: supported are {', '.join(DTYPES)}")
        self.config = dataclasses.replace(config, dtype=stored)
        self.tensors = found


def _all_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a directory, from the single file or through the index."""
    if not (directory / INDEX_NAME).is_file():
        if not (directory / SINGLE_NAME).is_file():
            raise ValueError(f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}: only safetensors are read")
        return read_safetensors_header(directory / SINGLE_NAME).tensors
    weight_map = read_json(directory / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{directory / INDEX_NAME} has no weight_map")
    shards = {name: read_safetensors_header(confined(directory, name)).tensors for name in set(weight_map.values())}
    for shard, tensors in shards.items():
        listed = {name for name, file_name in weight_map.items() if file_name == shard}
        check_names(tensors, listed, f"{directory / shard} (against the index)")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _check_tied(head_name: str, head: StoredTensor, embedding_name: str, embedding: StoredTensor) -> None:
    if head.dtype != embedding.dtype or head.shape != embedding.shape or not head.read().equal(embedding.read()):
        raise ValueError(f"config.json ties the embeddings, but {head_name} differs from {embedding_name}")

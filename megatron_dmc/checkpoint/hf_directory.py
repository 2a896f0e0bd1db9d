"""A Hugging Face model directory, read: configuration, weights, token ids, and how the two fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_dmc.checkpoint.companions import TOKEN_IDS, token_ids
from megatron_dmc.checkpoint.torch_file import StoredTensor
from megatron_dmc.checkpoint.weight_files import find_weights
from megatron_dmc.models.config import DTYPES, ModelConfig
from megatron_dmc.models.fusion import Cut
from megatron_dmc.models.hugging_face import parse_family, parse_hf_config, read_config_json
from megatron_dmc.models.hugging_face_settings import check_settings
from megatron_dmc.models.published_dms import plain_settings
from megatron_dmc.models.tensors import by_hf_name, check_names, hf_name
from megatron_dmc.support.element_types import ELEMENT_TYPES, ElementType

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class NamedTensor(NamedTuple):
    """A tensor that is not read yet, its name in the file, and the type that it is read in."""

    name: str
    stored: StoredTensor
    element_type: ElementType

    @property
    def dtype(self) -> torch.dtype:
        """The type that it is read in, as torch names it."""
        return self.element_type.dtype

    def read(self, cut: Cut | None = None) -> Tensor:
        """The tensor or a part of it, in memory of its own. Of rows no others are read."""
        if cut is None:
            return self.stored.read().to(self.dtype)
        if cut.axis == 0:
            return self.stored.rows(cut.first, cut.last).read().to(self.dtype)
        return cut.of(self.stored.read()).to(self.dtype)


class HuggingFaceDirectory:
    """The files of a model as ``save_pretrained`` writes them.

    Args:
        directory: with ``config.json``.
        ignored_settings: unknown settings of it that change nothing, as the user says.

    Attributes:
        config: the model, with the type of its tensors.
        dmc: DMC settings, of a compressed model.
        tensors: every tensor of the model by name.
        pickled: whether they are in pickled files, not in safetensors.
        config_json: ``config.json`` as it stands.
        notes: what was chosen or passed over where the files left a choice, in words.

    Raises:
        ValueError: an unsupported configuration, damaged files, missing, unknown or wrongly shaped tensors.
    """

    def __init__(self, directory: Path, ignored_settings: Collection[str] = ()) -> None:
        self.directory = directory
        self.config_json = read_config_json(directory)
        config, self.dmc = parse_hf_config(self.config_json, ignored_settings)
        settings = plain_settings(self.config_json)
        self.notes = check_settings(settings, parse_family(settings), ignored_settings)
        token_ids(directory)
        self.notes += [
            f"config.json: {name}=-1 stands for none" for name in TOKEN_IDS if self.config_json.get(name) == -1
        ]
        found, self.pickled, notes = find_weights(directory)
        self.notes += notes
        names = self._names_in_files(config, found)
        check_names(names, by_hf_name(config), str(directory))
        self.config = dataclasses.replace(config, dtype=self._dtype(config, {found[name] for name in names.values()}))
        element_type = ELEMENT_TYPES[self.config.dtype]
        self.tensors = {name: NamedTensor(stored, found[stored], element_type) for name, stored in names.items()}
        self._check_shapes()

    def _names_in_files(self, config: ModelConfig, found: dict[str, StoredTensor]) -> dict[str, str]:
        """The name in the files of every tensor, by its own name: a tied tensor may be stored under either or both."""
        names = {name: name for name in found}
        embedding, head = hf_name(config, "embedding"), hf_name(config, "output")
        if config.tie_word_embeddings and head in names:
            del names[head]
            if embedding in names:
                _check_tied(embedding, found[embedding], head, found[head])
            else:
                names[embedding] = head
                self.notes.append(f"{head} is read as {embedding}: config.json ties the two")
        return names

    def _dtype(self, config: ModelConfig, stored: set[StoredTensor]) -> str:
        """The stored type; where there are several, the one that ``config.json`` states."""
        given = sorted({tensor.element_type.name for tensor in stored})
        if unsupported := set(given) - set(DTYPES):
            raise ValueError(
                f"{self.directory} stores {', '.join(sorted(unsupported))}: supported are {', '.join(DTYPES)}"
            )
        if len(given) > 1:
            self.notes.append(f"tensors are stored as {' and '.join(given)}: all are read as {config.dtype}")
        return given[0] if len(given) == 1 else config.dtype

    def _check_shapes(self) -> None:
        for name, (entry, place) in by_hf_name(self.config).items():
            stored, expected = self.tensors[name].stored, entry.hf_shapes(self.config)[place]
            if stored.shape != expected:
                raise ValueError(f"{name} has shape {stored.shape}: config.json asks for {expected}")
            if not stored.contiguous:
                raise ValueError(f"{name} is stored as a view of another tensor: save it as one of its own")


def _check_tied(embedding: str, one: StoredTensor, head: str, other: StoredTensor) -> None:
    if one.element_type != other.element_type or one.shape != other.shape or not one.read().equal(other.read()):
        raise ValueError(
            f"config.json ties the embeddings, but {head} differs from {embedding}: set tie_word_embeddings to false "
            f"in config.json to keep {head}, or remove it from the weights"
        )

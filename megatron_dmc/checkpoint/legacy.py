"""Megatron's legacy layout (``--ckpt-format torch``): one pickled file per rank, read without unpickling.

``mp_rank_{tensor rank:02d}[_{pipeline rank:03d}]/model_optim_rng.pt`` holds ``{args, iteration, model, ...}``, with
``model0``, ``model1``, ... under virtual pipelining. Names and layer numbers are made those of the whole model here:
layers are counted over the chunks in the order of the forward pass.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.torch_file import StoredTensor, read_torch_file
from megatron_dmc.models.tensors import EMBEDDING, LOCAL_SPEC_NAMES, OUTPUT_LAYER

FILE_NAME = "model_optim_rng.pt"

_RANK = re.compile(r"mp_rank_(?P<tensor>[0-9]{2})(_(?P<pipeline>[0-9]{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(?P<layer>[0-9]+)\.(?P<rest>.+)")


def rank_directory(tensor_rank: int, pipeline_rank: int, pipeline_size: int) -> str:
    """Folder of a rank, as Megatron names it."""
    name = f"mp_rank_{tensor_rank:02d}"
    return name if pipeline_size == 1 else f"{name}_{pipeline_rank:03d}"


class LegacyCheckpoint:
    """One iteration directory (or the root of a published release) of the legacy layout.

    Attributes:
        tensor_size, pipeline_size: the layout the checkpoint was written in.
        virtual_size: model chunks per pipeline rank.

    Raises:
        ValueError: a rank that is missing, damaged or refused, or ranks that do not fit together.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        ranks = {}
        for entry in sorted(directory.iterdir()):
            match = _RANK.fullmatch(entry.name)
            if match is not None:
                ranks[int(match["tensor"]), int(match["pipeline"] or 0)] = entry / FILE_NAME
        if not ranks:
            raise ValueError(f"{directory} holds no mp_rank_* folders")
        self.tensor_size = 1 + max(tensor for tensor, _ in ranks)
        self.pipeline_size = 1 + max(pipeline for _, pipeline in ranks)
        self.paths = ranks
        for tensor in range(self.tensor_size):
            for pipeline in range(self.pipeline_size):
                if not ranks.get((tensor, pipeline), Path()).is_file():
                    folder = rank_directory(tensor, pipeline, self.pipeline_size)
                    raise ValueError(f"{directory / folder / FILE_NAME} is missing: partial copy?")

    @cached_property
    def _states(self) -> dict[tuple[int, int], dict[str, Any]]:
        states = {rank: read_torch_file(path) for rank, path in self.paths.items()}
        for rank, state in states.items():
            if not isinstance(state, dict) or not any(name.startswith("model") for name in map(str, state)):
                raise ValueError(f"{self.paths[rank]} holds no model of Megatron")
        return states

    @property
    def virtual_size(self) -> int:
        """Model chunks per pipeline rank (1 without virtual pipelining)."""
        return len(_chunks(self._states[0, 0]))

    def common_state(self) -> dict[str, Any]:
        """What every rank holds besides its weights."""
        return {name: value for name, value in self._states[0, 0].items() if not str(name).startswith("model")}

    def padded_vocab_size(self) -> int:
        """Rows of the embedding over all ranks."""
        return sum(shard.shape[0] for shard in self.tensors()[EMBEDDING])

    def tensors(self) -> dict[str, list[StoredTensor]]:
        """Every weight: its name in the whole model, and its shards by tensor rank.

        Raises:
            ValueError: a tensor that some ranks lack, or an entry that is not a tensor.
        """
        whole: dict[str, list[StoredTensor]] = {}
        first_layer = 0
        for chunk in range(self.virtual_size):
            for pipeline in range(self.pipeline_size):
                shards = [_weights(_chunks(self._states[rank, pipeline])[chunk]) for rank in range(self.tensor_size)]
                if any(shard.keys() != shards[0].keys() for shard in shards):
                    raise ValueError(f"{self.directory}: the tensor ranks of pipeline rank {pipeline} differ in names")
                self._collect(whole, shards, first_layer, is_first=pipeline == 0 and chunk == 0)
                first_layer += len({match["layer"] for name in shards[0] if (match := _LAYER.fullmatch(name))})
        if EMBEDDING not in whole:
            raise ValueError(f"{self.directory} holds no {EMBEDDING}: not a language model of Megatron")
        return whole

    def _collect(
        self, whole: dict[str, list[StoredTensor]], shards: list[dict[str, StoredTensor]], layer: int, is_first: bool
    ) -> None:
        for name in shards[0]:
            match = _LAYER.fullmatch(name)
            full = name
            if match is not None:
                rest = LOCAL_SPEC_NAMES.get(match["rest"], match["rest"])
                full = f"decoder.layers.{layer + int(match['layer'])}.{rest}"
            elif name == OUTPUT_LAYER and self._ties_embeddings and not is_first:
                continue  # the last stage's copy of the embedding
            if full in whole:
                raise ValueError(f"{self.directory} holds {full} twice")
            whole[full] = [shard[name] for shard in shards]

    @cached_property
    def _ties_embeddings(self) -> bool:
        arguments = self.common_state().get("args")
        state = getattr(arguments, "state", None) or {}
        return not state.get("untie_embeddings_and_output_weights", False)


def _chunks(state: dict[str, Any]) -> list[Any]:
    if "model" in state:
        return [state["model"]]
    count = sum(re.fullmatch(r"model[0-9]+", str(name)) is not None for name in state)
    return [state.get(f"model{number}") for number in range(count)]


def _weights(chunk: Any) -> dict[str, StoredTensor]:
    """The weights of a model chunk, without Transformer Engine's state of low-precision training."""
    if not isinstance(chunk, dict):
        raise ValueError(f"a model chunk is a {type(chunk).__name__}, not a dictionary of tensors")
    weights = {str(name): value for name, value in chunk.items() if not str(name).endswith("_extra_state")}
    for name, value in weights.items():
        if not isinstance(value, StoredTensor):
            raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")
    return weights

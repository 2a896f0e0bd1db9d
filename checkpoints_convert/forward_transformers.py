"""A Hugging Face directory walked with transformers' own layers, weights read by the safetensors library.

Deliberately shares nothing with the converter but the check of the directory: it is what the converter is
compared with.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import models as architectures

from megatron_dmc.checkpoint.hf_directory import HuggingFaceDirectory
from megatron_dmc.models.borrowed_channel import borrowed_by, without_borrowed_channels
from megatron_dmc.models.families import family_of
from megatron_dmc.models.hugging_face_settings import HARMLESS_SETTINGS
from megatron_dmc.models.published_dms import plain_settings
from megatron_dmc.models.tensors import by_hf_name, hf_name
from megatron_dmc.ops.borrowed import NO_HEAD

# About the file rather than the model, or not of a plain model.
_NOT_MODEL_SETTINGS = frozenset({"model_type", "architectures", "dmc", "sliding_window", "dtype", "torch_dtype"})


class TransformersModel:
    """See :class:`checkpoints_convert.forward.LayerwiseModel`."""

    def __init__(self, directory: Path, clears_borrowed: bool, ignored_settings: Sequence[str] = ()) -> None:
        self._files = HuggingFaceDirectory(directory, ignored_settings)
        self._cleared = borrowed_by(self._files.dmc) if clears_borrowed else NO_HEAD
        prefix = family_of(self._files.config.family).architecture.removesuffix("ForCausalLM")
        module = importlib.import_module(f"{architectures.__name__}.{prefix.lower()}.modeling_{prefix.lower()}")
        self._layer, self._norm = getattr(module, prefix + "DecoderLayer"), getattr(module, prefix + "RMSNorm")
        others = _NOT_MODEL_SETTINGS.union(HARMLESS_SETTINGS, ignored_settings)
        plain = plain_settings(self._files.config_json)
        settings = {name: value for name, value in plain.items() if name not in others}
        self._config = getattr(module, prefix + "Config").from_dict(settings, attn_implementation="eager")
        self._rotary = getattr(module, prefix + "RotaryEmbedding")(self._config)
        self.num_layers = self._config.num_hidden_layers

    def embed(self, tokens: Tensor) -> Tensor:
        name = hf_name(self._files.config, "embedding")
        rows = [self._read(name, row, row + 1) for row in tokens.flatten().tolist()]
        return torch.cat(rows).view(*tokens.shape, -1).float()

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        with torch.device("meta"):
            layer = self._layer(self._config, index)
        # The library's layers decide nothing.
        config = dataclasses.replace(self._files.config, adapter=False)
        weights = {}
        for name, (entry, place) in by_hf_name(config).items():
            if entry.layer == index:
                weight, role = self._read(name).float(), entry.row.parts[place].role
                weights[name.split(f".{index}.", 1)[1]] = without_borrowed_channels(role, weight, config, self._cleared)
        layer.load_state_dict(weights, assign=True)
        positions = torch.arange(hidden.shape[1])[None]
        return layer(
            hidden,
            attention_mask=torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )

    def final_norm(self, hidden: Tensor) -> Tensor:
        norm = self._norm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.load_state_dict({"weight": self._read(hf_name(self._files.config, "final_norm")).float()})
        return norm(hidden)

    def output_weight(self) -> Tensor:
        tied = self._config.tie_word_embeddings
        return self._read(hf_name(self._files.config, "embedding" if tied else "output"))

    def _read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows of a tensor. Of a pickled file by our reader: the library's would unpickle it."""
        tensor = self._files.tensors[name]
        if self._files.pickled:
            return tensor.stored.rows(first, last or tensor.stored.shape[0]).read().to(tensor.dtype)
        with safe_open(tensor.stored.path, framework="pt") as stream:
            return stream.get_slice(tensor.name)[first:last].to(tensor.dtype)

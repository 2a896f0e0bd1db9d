"""A Hugging Face directory walked with transformers' own layers, weights read by the safetensors library.

Deliberately shares nothing with the converter but the check of the directory: it is what the converter is
compared with.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from megatron_dmc.checkpoint.hf_directory import HuggingFaceDirectory
from megatron_dmc.models.borrowed_channel import clear_rows

# Of another class than LlamaConfig, or about the file rather than the model.
_NOT_LLAMA_SETTINGS = frozenset({"model_type", "architectures", "dmc", "sliding_window", "dtype", "torch_dtype"})


class TransformersModel:
    """See :class:`checkpoints_convert.forward.LayerwiseModel`."""

    def __init__(self, directory: Path, clears_borrowed: bool) -> None:
        self._files = HuggingFaceDirectory(directory)
        self._clears_borrowed = clears_borrowed
        settings = {name: value for name, value in self._files.config_json.items() if name not in _NOT_LLAMA_SETTINGS}
        self._config = LlamaConfig.from_dict(settings, attn_implementation="eager")
        self._rotary = LlamaRotaryEmbedding(self._config)
        self.num_layers = self._config.num_hidden_layers

    def embed(self, tokens: Tensor) -> Tensor:
        name = "model.embed_tokens.weight"
        with safe_open(self._files.tensors[name].path, framework="pt") as stream:
            rows = stream.get_slice(name)
            return (
                torch.stack([rows[row : row + 1][0] for row in tokens.flatten().tolist()])
                .view(*tokens.shape, -1)
                .float()
            )

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        with torch.device("meta"):
            layer = LlamaDecoderLayer(self._config, index)
        prefix = f"model.layers.{index}."
        weights = {name: self._read(prefix + name).float() for name in layer.state_dict()}
        if self._clears_borrowed:
            for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight"):
                weights[name] = clear_rows(weights[name], self._files.config.head_dim)
        layer.load_state_dict(weights, assign=True)
        positions = torch.arange(hidden.shape[1])[None]
        return layer(
            hidden,
            attention_mask=torch.full((hidden.shape[1],) * 2, float("-inf")).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=self._rotary(hidden, positions),
        )

    def final_norm(self, hidden: Tensor) -> Tensor:
        norm = LlamaRMSNorm(self._config.hidden_size, self._config.rms_norm_eps)
        norm.load_state_dict({"weight": self._read("model.norm.weight").float()})
        return norm(hidden)

    def output_weight(self) -> Tensor:
        tied = self._config.tie_word_embeddings
        return self._read("model.embed_tokens.weight" if tied else "lm_head.weight")

    def _read(self, name: str) -> Tensor:
        with safe_open(self._files.tensors[name].path, framework="pt") as stream:
            return stream.get_tensor(name)

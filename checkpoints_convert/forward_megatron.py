"""A Megatron checkpoint walked with Megatron core's own layers; ``forward`` has redirected them to the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dmc.checkpoint.guard import examine
from megatron_dmc.checkpoint.source import MegatronSource
from megatron_dmc.models.borrowed_channel import borrowed_by, parts_without_borrowed_channels
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.megatron import gpt_keywords, is_stock, transformer_keywords
from megatron_dmc.models.tensors import EMBEDDING, FINAL_NORM, LOCAL_SPEC_NAMES, OUTPUT_LAYER, Entry, entries
from megatron_dmc.ops.borrowed import NO_HEAD
from megatron_dmc.ops.rope import inverse_frequencies

_LAYER_PREFIX = "decoder.layers.*."
_ROTARY_KEYWORDS = ("rotary_base", "seq_len_interpolation_factor", "rope_scaling", "rope_scaling_factor")

WITHOUT_EXTENSIONS: dict[str, Any] = {
    "activation_func": torch.nn.functional.silu,
    "perform_initialization": False,
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""Keywords of TransformerConfig for layers in plain PyTorch whose weights will be loaded."""


class MegatronModel:
    """See :class:`checkpoints_convert.forward.LayerwiseModel`."""

    def __init__(self, path: Path, clears_borrowed: bool) -> None:
        _start_single_process()
        self._source = MegatronSource(examine(path))
        self._cleared = borrowed_by(self._source.dmc) if clears_borrowed else NO_HEAD
        config = self._source.config
        self.num_layers = config.num_layers
        self._config = TransformerConfig(**transformer_keywords(config), **WITHOUT_EXTENSIONS)
        self._spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_norm)
        self._rotary = _rotary_embedding(config)
        # Its layers decide nothing.
        self._entries = entries(dataclasses.replace(config, adapter=False))

    def embed(self, tokens: Tensor) -> Tensor:
        rows = [self._source.embedding_row(row) for row in tokens.flatten().tolist()]
        return torch.stack(rows).view(*tokens.shape, -1).float()

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        with torch.device("meta"):
            layer = build_module(self._spec, config=self._config, layer_number=index + 1)
        weights = {
            _local_spec_name(entry): self._fused(entry).float() for entry in self._entries if entry.layer == index
        }
        layer.load_state_dict(weights, assign=True)
        length = hidden.shape[1]
        output, _ = layer(
            hidden.transpose(0, 1).contiguous(),
            attention_mask=torch.ones(length, length, dtype=torch.bool).triu(1)[None, None],
            rotary_pos_emb=self._rotary(length),
        )
        return output.transpose(0, 1)

    def final_norm(self, hidden: Tensor) -> Tensor:
        weight = self._source.fused(self._outside(FINAL_NORM)).float()
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, self._source.config.rms_norm_eps)

    def output_weight(self) -> Tensor:
        name = EMBEDDING if self._source.config.tie_word_embeddings else OUTPUT_LAYER
        return self._source.fused(self._outside(name))

    def _outside(self, megatron_name: str) -> Entry:
        return next(entry for entry in self._entries if entry.row.megatron == megatron_name)

    def _fused(self, entry: Entry) -> Tensor:
        source = self._source
        if self._cleared == NO_HEAD:
            return source.fused(entry)
        parts = parts_without_borrowed_channels(entry, source.parts(entry), source.config, self._cleared)
        return entry.row.layout.fuse(parts, source.shape)


def _rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    rotary = RotaryEmbedding(
        kv_channels=config.head_dim,
        rotary_percent=1.0,
        use_cpu_initialization=True,
        **{name: value for name, value in gpt_keywords(config).items() if name in _ROTARY_KEYWORDS},
    )
    if not is_stock(config):
        # Megatron has no keywords for these frequencies; training computes them itself, too.
        rotary.inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    return rotary


def _start_single_process() -> None:
    """Megatron's layers ask for their process groups even where there is one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _local_spec_name(entry: Entry) -> str:
    name = entry.row.megatron.removeprefix(_LAYER_PREFIX)
    return next((local for local, shared in LOCAL_SPEC_NAMES.items() if shared == name), name)

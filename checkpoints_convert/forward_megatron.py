"""A Megatron checkpoint walked with Megatron core's own layers; ``forward`` has redirected them to the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dmc.checkpoint.legacy import LOCAL_SPEC_NAMES
from megatron_dmc.checkpoint.locate import locate
from megatron_dmc.checkpoint.settings import megatron_arguments
from megatron_dmc.checkpoint.source import MegatronSource
from megatron_dmc.models import fusion
from megatron_dmc.models.borrowed_channel import clear_rows
from megatron_dmc.models.tensors import EMBEDDING_ROW, OUTPUT_LAYER, Entry, entries

_LAYER_PREFIX = "decoder.layers.*."


class MegatronModel:
    """See :class:`checkpoints_convert.forward.LayerwiseModel`."""

    def __init__(self, path: Path, clears_borrowed: bool) -> None:
        _start_single_process()
        self._source = MegatronSource(locate(path))
        self._clears_borrowed = clears_borrowed
        config = self._source.config
        self.num_layers = config.num_layers
        self._arguments = megatron_arguments(config)
        self._config = _transformer_config(self._arguments)
        self._spec = get_gpt_layer_local_spec(normalization=self._arguments["normalization"])
        self._rotary = RotaryEmbedding(
            kv_channels=self._arguments["kv_channels"],
            rotary_percent=self._arguments["rotary_percent"],
            rotary_interleaved=self._arguments["rotary_interleaved"],
            seq_len_interpolation_factor=self._arguments["rotary_seq_len_interpolation_factor"],
            rotary_base=self._arguments["rotary_base"],
            rope_scaling=self._arguments["use_rope_scaling"],
            rope_scaling_factor=self._arguments["rope_scaling_factor"],
            use_cpu_initialization=True,
        )
        self._entries = entries(config)

    def embed(self, tokens: Tensor) -> Tensor:
        rows = [self._source.embedding_row(row) for row in tokens.flatten().tolist()]
        return torch.stack(rows).view(*tokens.shape, -1).float()

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        with torch.device("meta"):
            layer = build_module(self._spec, config=self._config, layer_number=index + 1)
        weights = {}
        for entry in self._entries:
            if entry.layer == index:
                weight = self._source.fused(entry).float()
                weights[_local_spec_name(entry)] = (
                    self._cleared(weight) if entry.mapping.layout is fusion.QKV else weight
                )
        layer.load_state_dict(weights, assign=True)
        length = hidden.shape[1]
        output, _ = layer(
            hidden.transpose(0, 1).contiguous(),
            attention_mask=torch.ones(length, length, dtype=torch.bool).triu(1)[None, None],
            rotary_pos_emb=self._rotary(length),
        )
        return output.transpose(0, 1)

    def final_norm(self, hidden: Tensor) -> Tensor:
        weight = self._source.fused(self._outside("decoder.final_layernorm.weight")).float()
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, self._arguments["layernorm_epsilon"])

    def output_weight(self) -> Tensor:
        name = EMBEDDING_ROW if self._source.config.tie_word_embeddings else OUTPUT_LAYER
        return self._source.fused(self._outside(name))

    def _outside(self, megatron_name: str) -> Entry:
        return next(entry for entry in self._entries if entry.mapping.megatron == megatron_name)

    def _cleared(self, fused: Tensor) -> Tensor:
        """The fused weight with the borrowed rows of q and k at zero: per group its queries, its key, its value."""
        if not self._clears_borrowed:
            return fused
        config = self._source.config
        by_group = fused.reshape(config.num_kv_heads, -1, fused.shape[-1])
        heads = (config.queries_per_kv_head + 1) * config.head_dim
        by_group[:, :heads] = clear_rows(by_group[:, :heads].transpose(0, 1), config.head_dim).transpose(0, 1)
        return by_group.reshape(fused.shape)


def _start_single_process() -> None:
    """Megatron's layers ask for their process groups even where there is one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)


def _transformer_config(arguments: dict[str, Any]) -> Any:
    return TransformerConfig(
        num_layers=arguments["num_layers"],
        hidden_size=arguments["hidden_size"],
        num_attention_heads=arguments["num_attention_heads"],
        num_query_groups=arguments["num_query_groups"],
        kv_channels=arguments["kv_channels"],
        ffn_hidden_size=arguments["ffn_hidden_size"],
        layernorm_epsilon=arguments["layernorm_epsilon"],
        normalization=arguments["normalization"],
        add_bias_linear=arguments["add_bias_linear"],
        gated_linear_unit=arguments["swiglu"],
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _local_spec_name(entry: Entry) -> str:
    name = entry.mapping.megatron.removeprefix(_LAYER_PREFIX)
    return next((local for local, shared in LOCAL_SPEC_NAMES.items() if shared == name), name)

"""Megatron's layer spec with our attention in it."""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import default_layer_spec

from megatron_dmc.config import DMCConfig, has_adapter
from megatron_dmc.training.model.adapter import AdapterLayer
from megatron_dmc.training.model.attention import DMCSelfAttention, MethodCoreAttention
from megatron_dmc.training.model.norm import DMCRMSNorm


def with_compressing_attention(layer_spec: ModuleSpec, settings: DMCConfig) -> ModuleSpec:
    """A copy of a GPT layer spec whose self-attention is ours; linears and norms stay.

    Where there is an adapter the layer is ours too.
    """
    layer_spec = copy.deepcopy(layer_spec)
    if has_adapter(settings):
        assert layer_spec.module is TransformerLayer
        layer_spec.module = AdapterLayer
    attention = layer_spec.submodules.self_attention
    attention.module = DMCSelfAttention
    attention.submodules.core_attention = MethodCoreAttention
    return layer_spec


def dmc_block_spec(model_config: Any, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec of a whole pipeline stage: Megatron's own layer with compressing attention.

    With Transformer Engine the norms are part of its linears. The local spec gets :class:`DMCRMSNorm` everywhere,
    the final norm included, because Megatron's own refuses sequence parallelism.
    """
    layer_spec = with_compressing_attention(default_layer_spec(model_config, vp_stage), model_config.transformer.dmc)
    if model_config.transformer.transformer_impl == "transformer_engine":
        return layer_spec
    layer_spec.submodules.input_layernorm = DMCRMSNorm
    layer_spec.submodules.pre_mlp_layernorm = DMCRMSNorm
    if model_config.transformer.qk_layernorm:
        attention = layer_spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = DMCRMSNorm
    num_layers = get_num_layers_to_build(model_config.transformer, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=DMCRMSNorm)

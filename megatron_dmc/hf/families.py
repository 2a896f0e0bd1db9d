"""The families in transformers: its modules of each, with what is ours before them."""

from __future__ import annotations

from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3ForCausalLM, Qwen3Model

from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig, DMCQwen2Config, DMCQwen3Config
from megatron_dmc.hf.modeling_dmc_llama import CompressedAttention, CompressedForCausalLM, CompressedModel


class DMCLlamaAttention(CompressedAttention, LlamaAttention):
    """Llama's projections."""


class DMCLlamaModel(CompressedModel, LlamaModel):
    """Llama without its output layer."""

    config_class = DMCLlamaConfig
    attention_class = DMCLlamaAttention


class DMCLlamaForCausalLM(CompressedForCausalLM, LlamaForCausalLM):
    """Llama."""

    config_class = DMCLlamaConfig
    model_class = DMCLlamaModel


class DMCQwen2Attention(CompressedAttention, Qwen2Attention):
    """Qwen 2's projections, which have biases."""


class DMCQwen2Model(CompressedModel, Qwen2Model):
    """Qwen 2 without its output layer."""

    config_class = DMCQwen2Config
    attention_class = DMCQwen2Attention


class DMCQwen2ForCausalLM(CompressedForCausalLM, Qwen2ForCausalLM):
    """Qwen 2 and 2.5."""

    config_class = DMCQwen2Config
    model_class = DMCQwen2Model


class DMCQwen3Attention(CompressedAttention, Qwen3Attention):
    """Qwen 3's projections and norms."""

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


class DMCQwen3Model(CompressedModel, Qwen3Model):
    """Qwen 3 without its output layer."""

    config_class = DMCQwen3Config
    attention_class = DMCQwen3Attention


class DMCQwen3ForCausalLM(CompressedForCausalLM, Qwen3ForCausalLM):
    """Qwen 3."""

    config_class = DMCQwen3Config
    model_class = DMCQwen3Model

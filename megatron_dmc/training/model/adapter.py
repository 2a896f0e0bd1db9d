"""Adapters in Megatron's layers: decision logits from the hidden state as it enters a layer, before its norm.

Self-attention receives that state behind the norm, or (Transformer Engine) norms it itself. So the layer, which has it
in both specifications, computes the logits, and they go into the layer's attention as one more channel of its keys:
what Megatron recomputes or offloads then holds them too.

Legend: S sequence (local; a shard of it under sequence parallelism), B batch, H hidden, G KV heads of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_dmc.training.model.microbatch import Microbatch

MODULES = ("decision_norm", "decision")
"""Of self-attention."""


def is_of_adapter(name: str) -> bool:
    """Whether a parameter, or an entry of a state dictionary, belongs to an adapter."""
    return any(f".self_attention.{module}." in name for module in MODULES)


class WithAdapter(NamedTuple):
    """What an adapter says about a micro-batch, handed to self-attention with it."""

    microbatch: Microbatch
    adapter_SBG: Tensor
    """Its outputs, of the whole local sequence, before scale and bias."""


class AdapterLayer(TransformerLayer):
    """Megatron's layer whose self-attention has an adapter."""

    def forward(
        self, hidden_states: Tensor, *args: Any, attention_bias: Microbatch | None = None, **kwargs: Any
    ) -> Any:
        """As Megatron's; ``attention_bias`` is the micro-batch. The teacher asks no adapter."""
        assert attention_bias is not None
        given = attention_bias if attention_bias.is_teachers else self._asked(hidden_states, attention_bias)
        return super().forward(hidden_states, *args, attention_bias=given, **kwargs)

    def _asked(self, hidden_SBH: Tensor, microbatch: Microbatch) -> WithAdapter:
        return WithAdapter(microbatch, self.self_attention.adapter_logits(hidden_SBH))


def train_adapters_alone(model: Any) -> None:
    """Freeze everything else, before gradient buffers and the optimizer are made of what has a gradient.

    A layer that is recomputed differentiates itself only where its input asks for it, and the embedding, which is
    frozen, would not.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of_adapter(name))
    if model.pre_process:
        model.embedding.register_forward_hook(_ask_for_gradients)


def _ask_for_gradients(module: Any, args: Any, output: Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_()

"""The start of ``retrofit`` in Megatron's weights: the borrowed channels are zero, and able to learn."""

from __future__ import annotations

from typing import Any

import torch

from megatron_dmc.models.borrowed_channel import borrowed_by, borrowed_rows, borrowed_rows_of_qkv
from megatron_dmc.ops.borrowed import EVERY_HEAD


@torch.no_grad()
def clear_borrowed_rows(model: Any) -> None:
    """Set the rows (and biases, if any) to zero, in place, so that decisions start at ``sigmoid(-decision_bias)``.

    Where queries and keys are normalised and every head lends a channel, the norm passes it on unscaled:
    ``models.borrowed_channel`` says why. Tensor parallelism cuts ``linear_qkv`` between groups, so a rank's part has
    the order of the whole.
    """
    config = model.config
    borrowed = borrowed_by(config.dmc)
    queries_per_group = config.num_attention_heads // config.num_query_groups
    for layer in model.decoder.layers:
        attention = layer.self_attention
        for parameter in (attention.linear_qkv.weight, getattr(attention.linear_qkv, "bias", None)):
            if parameter is not None and parameter.numel():
                borrowed_rows_of_qkv(parameter.data, queries_per_group, config.kv_channels, borrowed).zero_()
        if config.qk_layernorm and borrowed == EVERY_HEAD:
            for norm in (attention.q_layernorm, attention.k_layernorm):
                borrowed_rows(norm.weight.data, config.kv_channels).fill_(1)

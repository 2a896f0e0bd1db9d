"""The weight rows that produce the borrowed channels: the last channel of every query and key head.

Legend: G KV groups of this rank, q query heads of a group, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def clear_borrowed_rows(model: Any) -> None:
    """Set the rows (and biases, if any) to zero, in place, so that decisions start at ``sigmoid(-decision_bias)``.

    ``linear_qkv`` holds per KV group the rows of its query heads, its key head and its value head; tensor parallelism
    cuts between groups, so a rank's part has the same order.
    """
    config = model.config
    queries_per_group = config.num_attention_heads // config.num_query_groups
    for layer in model.decoder.layers:
        linear = layer.self_attention.linear_qkv
        for parameter in (linear.weight, getattr(linear, "bias", None)):
            if parameter is None or parameter.numel() == 0:
                continue
            heads_GhD = parameter.data.view(-1, queries_per_group + 2, config.kv_channels, *parameter.shape[1:])
            heads_GhD[:, : queries_per_group + 1, -1] = 0

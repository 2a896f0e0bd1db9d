"""The same training step by plain autograd: the compression loss is a term of the loss, and nothing else carries it.

Only possible on one rank without recompute, where every decision of the model is in one graph.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_dmc.training import forward_step
from megatron_dmc.training.model import attention
from tests.layouts import probe


class _KeepFraction:
    """Stands in for ``AttachStatistic``: leaves the output alone and keeps the differentiable statistic."""

    @staticmethod
    def apply(output: Any, fraction_B: Any, share: float, microbatch: Any) -> Any:
        microbatch.__dict__.setdefault("fractions", []).append(fraction_B)
        return output


def train(argv: list[str]) -> probe.Record:
    """As ``probe.train``, with the gradient of the compression loss from autograd."""
    report = forward_step._loss

    def loss(mask: Any, microbatch: Any, config: Any, loss_BS: Any) -> Any:
        lm_sum, num_tokens, logged = report(mask, microbatch, config, loss_BS)
        fraction_B = torch.stack(microbatch.fractions).mean(dim=0)
        hinge = torch.clamp(microbatch.target_fraction - fraction_B, min=0.0).mean()
        # Megatron divides by the number of tokens.
        return lm_sum + num_tokens * config.dmc.loss_weight * hinge, num_tokens, logged

    attention.AttachStatistic = _KeepFraction
    forward_step._loss = loss
    return probe.train(argv)

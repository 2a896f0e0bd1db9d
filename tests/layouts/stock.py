"""Megatron's own pretraining of the same command, with nothing of ours in the model or around it."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_dmc.training import pretrain
from tests.layouts import probe


@dataclass
class OffRecord:
    """A run at stage ``off``: logits of every micro-batch, LM losses, and gradients of the first step."""

    run: probe.Record
    logits: list[np.ndarray] = field(default_factory=list)


def train_off(argv: list[str]) -> OffRecord:
    """Through the product."""
    record = OffRecord(probe.Record())
    _record_logits(record)
    record.run = probe.train(argv)
    return record


def train_stock(argv: list[str]) -> OffRecord:
    """Through Megatron alone: its model configuration, its builder, the forward step of its pretraining script."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain as engine
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from megatron_dmc.training.data_sets import build_data_sets

    completed = pretrain.prepare(argv).argv
    record = OffRecord(probe.Record())
    _record_logits(record)
    probe.record_gradients(record.run)
    sys.argv = [sys.argv[0], *_without_our_flags(completed)]
    args = parse_and_validate_args()
    args.dmc_total_samples, args.dmc_first_sample = None, 0
    engine(
        cfg_container=pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        train_valid_test_dataset_provider=build_data_sets,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=functools.partial(_forward_step, record),
    )
    return record


def _without_our_flags(argv: list[str]) -> list[str]:
    kept = list(argv)
    while ours := [at for at, argument in enumerate(kept) if argument.startswith("--dmc-")]:
        del kept[ours[0] : ours[0] + 2]
    return kept


def _forward_step(record: OffRecord, data_iterator: Any, model: Any) -> Any:
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])

    def loss(loss_BS: Any) -> Any:
        mask = batch["loss_mask"].view(-1).float()
        total, count = torch.sum(loss_BS.float().view(-1) * mask), mask.sum().to(torch.int)
        record.run.steps.append({"lm loss": float(total / count)})
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return output, loss


def _record_logits(record: OffRecord) -> None:
    from megatron.core.models.gpt import GPTModel

    cross_entropy = GPTModel.compute_language_model_loss

    def recorded(self: Any, labels: Any, logits: Any) -> Any:
        record.logits.append(logits.detach().numpy().copy())
        return cross_entropy(self, labels, logits)

    GPTModel.compute_language_model_loss = recorded

"""What one rank records while it trains: losses of every step, gradients and decisions of one, the last weights.

Everything is returned as numpy arrays. Legend: S sequence, B batch, G KV heads.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from megatron_dmc.models.borrowed_channel import borrowed_by, borrowed_rows_of_qkv
from megatron_dmc.ops.borrowed import EVERY_HEAD
from megatron_dmc.training import metrics, pretrain, start
from megatron_dmc.training.model.builder import DMCModelBuilder

ADAPTER_STD = 0.004
"""Of random adapters: over 64 channels of size 1, times 100, logits of about 3."""


@dataclass
class Decisions:
    """Decision logits and noise of one layer for a micro-batch's sequences, this rank's heads and positions."""

    layer: int
    sequence_B: np.ndarray
    head_G: np.ndarray
    position_S: np.ndarray
    logits_SBG: np.ndarray
    noise_SBG: np.ndarray


@dataclass
class Record:
    """One rank's run.

    Attributes:
        tensor_rank: rank within tensor parallelism.
        steps: per step the logged values; empty except on the last pipeline stage.
        validations: per validation the logged values, likewise.
        gradients: by global parameter name, after all reductions, of the watched step; none of what is frozen.
        weights: by global parameter name, as the last step used them.
        split_dimension: by global parameter name, the dimension that tensor parallelism cuts; None = whole.
        decisions: of the watched step.
    """

    tensor_rank: int = 0
    steps: list[dict[str, float]] = field(default_factory=list)
    validations: list[dict[str, float]] = field(default_factory=list)
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    split_dimension: dict[str, int | None] = field(default_factory=dict)
    decisions: list[Decisions] = field(default_factory=list)


def train(argv: list[str], watched: int = 0) -> Record:
    """Run one stage through the product's own entry and record it.

    Args:
        argv: flags of ``megatron-dmc train``.
        watched: number of the step, 0 = the first of this run, whose gradients and decisions are kept.
    """
    record = Record()
    _record_steps(record)
    _record_validations(record)
    record_gradients(record, watched)
    pretrain.train(argv, observer=_DecisionRecorder(record, watched))
    return record


def make_base(argv: list[str], spread: float) -> Record:
    """Save random weights as if ``--dmc-stage`` had trained them, with decision logits on both sides of zero.

    Args:
        argv: of a run with learning rate zero.
        spread: factor on the rows that produce the borrowed channels; random ones would hardly ever accumulate.
            Adapters, which begin at zero, become random.
    """
    pretrain.find_start = lambda *_: start.Start(config=None, resumes=False)
    build = DMCModelBuilder.build_model

    def build_spread(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(self, *args, **kwargs)
        config = model.config
        queries = config.num_attention_heads // config.num_query_groups
        borrowed = borrowed_by(config.dmc) if config.dmc.retrofits else EVERY_HEAD
        for layer in model.decoder.layers:
            attention = layer.self_attention
            borrowed_rows_of_qkv(attention.linear_qkv.weight.data, queries, config.kv_channels, borrowed).mul_(spread)
            if hasattr(attention, "decision"):
                attention.decision.weight.data.normal_(std=ADAPTER_STD)
        return model

    DMCModelBuilder.build_model = build_spread
    return train(argv)


def _record_steps(record: Record) -> None:
    observe = metrics.StepRecorder.__call__

    def recorded(self: Any, logged: dict[str, Any]) -> None:
        if logged["loss_dict"]:
            values = {name: float(value) for name, value in logged["loss_dict"].items()}
            record.steps.append(values | {"grad norm": float(logged["grad_norm"] or 0.0)})
        observe(self, logged)

    metrics.StepRecorder.__call__ = recorded


def _record_validations(record: Record) -> None:
    from megatron.training import training

    evaluate = training.evaluate

    def recorded(*args: Any, **kwargs: Any) -> Any:
        answer = evaluate(*args, **kwargs)
        if answer[0]:
            record.validations.append({name: float(value) for name, value in answer[0].items()})
        return answer

    training.evaluate = recorded


def record_gradients(record: Record, watched: int = 0) -> None:
    """Keep gradients after all reductions and before the optimizer, and weights before every step."""
    from megatron.core import parallel_state
    from megatron.training import training

    finalize = training.finalize_model_grads
    steps = itertools.count()

    def recorded(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(chunks, *args, **kwargs)
        step = next(steps)
        record.tensor_rank = parallel_state.get_tensor_model_parallel_rank()
        for chunk in chunks:
            if step == watched:
                _gather_shards(chunk)
            for name, parameter in chunk.named_parameters():
                name = _global_name(name, chunk)
                is_split = getattr(parameter, "tensor_model_parallel", False)
                record.split_dimension[name] = parameter.partition_dim if is_split else None
                record.weights[name] = parameter.detach().float().numpy().copy()
                assert hasattr(parameter, "main_grad") == parameter.requires_grad, f"{name}: a buffer for nothing"
                if step == watched and parameter.requires_grad:
                    record.gradients[name] = parameter.main_grad.float().numpy().copy()

    training.finalize_model_grads = recorded


def _gather_shards(chunk: Any) -> None:
    """The distributed optimizer reduces gradients to one shard per rank; put the shards together."""
    for buffer in chunk.buffers:
        if not buffer.ddp_config.use_distributed_optimizer:
            continue
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = bucket.grad_data.view(group.size(), -1)
            mine = shards[group.rank()].clone()
            torch.distributed.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _global_name(name: str, chunk: Any) -> str:
    """Parameter name with the number of its layer in the whole model instead of its place in the chunk.

    A tied output layer on a pipeline stage of its own is a replica of the embedding.
    """
    while hasattr(chunk, "module"):
        chunk = chunk.module
        name = name.removeprefix("module.")
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if found := re.match(r"decoder\.layers\.(\d+)\.(.*)", name):
        number = chunk.decoder.layers[int(found[1])].layer_number - 1
        return f"decoder.layers.{number}.{found[2]}"
    return name


class _DecisionRecorder:
    """Keeps what every layer decides in one step, and the noise that it decided with."""

    def __init__(self, record: Record, watched: int) -> None:
        self._record, self._watched = record, watched
        self._first_step: int | None = None

    def __call__(self, microbatch: Any, layer_number: int, first_head: int, decisions: Any) -> None:
        if microbatch.sequence_B is None:
            return
        if self._first_step is None:
            self._first_step = microbatch.step
        if microbatch.step != self._first_step + self._watched:
            return
        own_L = microbatch.geometry.query_T
        logits_LBG = decisions.logits[own_L].detach().float()
        noise_LBG = decisions.noise[own_L]
        head_G = torch.arange(first_head, first_head + logits_LBG.shape[-1])
        tensors = (microbatch.sequence_B, head_G, own_L, logits_LBG, noise_LBG)
        self._record.decisions.append(Decisions(layer_number, *(tensor.numpy().copy() for tensor in tensors)))

"""What compressing attention cannot serve, found before a model is built.

What every model has alike stands in the table of ``models.megatron``; here is what belongs to training.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dmc.config import NONE
from megatron_dmc.models.megatron import ALL_SETTINGS, Setting

MIN_HEAD_DIM = 16


@dataclass(frozen=True)
class Requirement:
    """One condition on Megatron's model configuration.

    Attributes:
        holds: whether a configuration meets it.
        given: what the configuration says, for the message.
        allowed: what works and what to change.
    """

    holds: Callable[[Any], bool]
    given: Callable[[Any], str]
    allowed: str


_LOW_PRECISION = "the linears of a compressed model run in bf16 or fp32; remove "
_NO_LOGITS = "attention logits are never materialized; remove "

OFF = {
    "fp8_dot_product_attention": "attention runs in bf16 or fp32; remove the flag",
    "fp8_multi_head_attention": "attention runs in bf16 or fp32; remove the flag",
    "fp8": _LOW_PRECISION + "--fp8-format",
    "fp4": _LOW_PRECISION + "--fp4-format",
    "use_kitchen": _LOW_PRECISION + "the Kitchen flags",
    "heterogeneous_block_specs": "all layers are alike; remove --heterogeneous-layers-config-path",
    "is_hybrid_model": "all layers are attention layers; remove --hybrid-layer-pattern",
    "restore_modelopt_state": "quantised models are not supported; remove --restore-modelopt-state",
    "fused_single_qkv_rope": "decisions are read before RoPE; remove --fused-single-qkv-rope",
    "softmax_scale": "the scale is 1 / sqrt(head dimension); leave softmax_scale unset",
    "qk_clip": _NO_LOGITS + "--qk-clip",
    "log_max_attention_logit": _NO_LOGITS + "--log-max-attention-logit",
    "hybrid_context_parallel": "use --context-parallel-size instead of hybrid context parallelism",
    "qk_l2_norm": "only a norm with a weight is supported; remove --qk-l2-norm",
}
"""Fields that must be unset, False, zero or None, and what works instead."""


def _read(config: Any, field: str) -> Any:
    """A field of Megatron's configuration. A check of one that is not there has failed."""
    if not hasattr(config, field):
        raise ValueError(f"this Megatron's model configuration has no {field}: install a version that was tested")
    return getattr(config, field)


def _field(field: str, holds: Callable[[Any], bool], allowed: str) -> Requirement:
    return Requirement(
        lambda config: holds(_read(config, field)), lambda config: f"{field}={_read(config, field)!r}", allowed
    )


def _without_teacher(field: str, allowed: str) -> Requirement:
    """Fields that must be off where every stage runs twice."""
    return Requirement(
        lambda config: not (_read(config, field) and config.dmc.distill != NONE),
        lambda config: f"{field}={_read(config, field)!r} with dmc_distill={config.dmc.distill!r}",
        allowed,
    )


def _of_every_model(setting: Setting) -> Requirement:
    """A setting that has one value in all models."""
    assert setting.remedy is not None
    return _field(setting.attribute, setting.has, setting.remedy)


REQUIREMENTS = (
    *(_of_every_model(setting) for setting in ALL_SETTINGS if setting.remedy is not None),
    *(_field(field, operator.not_, allowed) for field, allowed in OFF.items()),
    Requirement(
        lambda config: config.attention_backend.name != "local",
        lambda config: "--attention-backend local",
        "it would replace compressing attention in silence; leave --attention-backend at auto",
    ),
    _field(
        "cuda_graph_impl",
        lambda value: value == "none",
        "statistics change with every micro-batch; train with --cuda-graph-impl none",
    ),
    _without_teacher(
        "defer_embedding_wgrad_compute",
        "the output layer would keep the teacher's activations; remove --defer-embedding-wgrad-compute",
    ),
    _without_teacher(
        "fine_grained_activation_offloading",
        "the teacher's activations would be moved as well; remove --fine-grained-activation-offloading",
    ),
    Requirement(
        lambda config: config.num_query_groups % config.tensor_model_parallel_size == 0,
        lambda config: (
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} with {config.num_query_groups} KV heads"
        ),
        "every rank needs the same whole number of KV heads; lower --tensor-model-parallel-size",
    ),
    _field(
        "kv_channels",
        lambda value: value % 2 == 0 and value >= MIN_HEAD_DIM,
        f"the head dimension must be even and at least {MIN_HEAD_DIM}",
    ),
)


def check_model_config(model_config: Any) -> None:
    """Raise ``ValueError`` with every unmet requirement of a compressing model."""
    unmet = [rule for rule in REQUIREMENTS if not rule.holds(model_config)]
    if unmet:
        lines = [f"{rule.given(model_config)}: {rule.allowed}" for rule in unmet]
        raise ValueError("this model cannot be compressed:\n  " + "\n  ".join(lines))

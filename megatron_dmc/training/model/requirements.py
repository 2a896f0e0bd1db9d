"""What compressing attention cannot serve, found before a model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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


def _off(field: str, allowed: str) -> Requirement:
    """A field that must be unset, False, zero or None."""
    return Requirement(
        lambda config: not getattr(config, field, None),
        lambda config: f"{field}={getattr(config, field, None)!r}",
        allowed,
    )


REQUIREMENTS = (
    Requirement(
        lambda config: config.attention_backend.name != "local",
        lambda config: "--attention-backend local",
        "it would replace compressing attention in silence; leave --attention-backend at auto",
    ),
    _off("window_size", "sliding windows are not supported; remove --window-size"),
    _off("multi_latent_attention", "only multi-head and grouped-query attention compress; remove it"),
    _off("mtp_num_layers", "multi-token prediction is not supported; remove --mtp-num-layers"),
    _off("num_moe_experts", "mixtures of experts are not supported; remove --num-experts"),
    _off("fp8_dot_product_attention", "attention runs in bf16 or fp32; remove the flag"),
    _off("fp8_multi_head_attention", "attention runs in bf16 or fp32; remove the flag"),
    _off("fp8", "the linears of a compressed model run in bf16 or fp32; remove --fp8-format"),
    _off("fp4", "the linears of a compressed model run in bf16 or fp32; remove --fp4-format"),
    Requirement(
        lambda config: config.cuda_graph_impl == "none",
        lambda config: f"cuda_graph_impl={config.cuda_graph_impl!r}",
        "statistics change with every micro-batch; train with --cuda-graph-impl none",
    ),
    _off("experimental_attention_variant", "only softmax attention compresses; remove the flag"),
    _off("heterogeneous_block_specs", "all layers are alike; remove --heterogeneous-layers-config-path"),
    _off("is_hybrid_model", "all layers are attention layers; remove --hybrid-layer-pattern"),
    _off("use_kitchen", "the linears of a compressed model run in bf16 or fp32; remove the Kitchen flags"),
    _off("restore_modelopt_state", "quantised models are not supported; remove --restore-modelopt-state"),
    _off("fused_single_qkv_rope", "decisions are read before RoPE; remove --fused-single-qkv-rope"),
    _off("attention_output_gate", "not part of Llama; remove --attention-output-gate"),
    Requirement(
        lambda config: config.softmax_type == "vanilla",
        lambda config: f"softmax_type={config.softmax_type!r}",
        "attention sinks are not supported; use --softmax-type vanilla",
    ),
    _off("softmax_scale", "the scale is 1 / sqrt(head dimension); leave softmax_scale unset"),
    _off("use_mup", "it rescales attention; remove --use-mup"),
    _off("qk_clip", "attention logits are never materialized; remove --qk-clip"),
    _off("log_max_attention_logit", "attention logits are never materialized; remove --log-max-attention-logit"),
    _off("no_rope_freq", "every layer rotates its keys; remove --no-rope-freq"),
    Requirement(
        lambda config: config.position_embedding_type == "rope",
        lambda config: f"position_embedding_type={config.position_embedding_type!r}",
        "keys are rotated after pooling; use --position-embedding-type rope",
    ),
    Requirement(
        lambda config: config.rotary_percent == 1.0,
        lambda config: f"rotary_percent={config.rotary_percent}",
        "rotary embeddings cover the whole head; use --rotary-percent 1.0",
    ),
    _off("rotary_interleaved", "Llama rotates halves; remove --rotary-interleaved"),
    _off("hybrid_context_parallel", "use --context-parallel-size instead of hybrid context parallelism"),
    _off("qk_layernorm", "normalised queries and keys hide the borrowed channel; remove --qk-layernorm"),
    _off("qk_l2_norm", "normalised queries and keys hide the borrowed channel; remove --qk-l2-norm"),
    Requirement(
        lambda config: config.attention_dropout == 0,
        lambda config: f"attention_dropout={config.attention_dropout}",
        "use --attention-dropout 0",
    ),
    Requirement(
        lambda config: config.normalization == "RMSNorm",
        lambda config: f"normalization={config.normalization!r}",
        "Llama's norm; use --normalization RMSNorm",
    ),
    Requirement(
        lambda config: config.num_query_groups % config.tensor_model_parallel_size == 0,
        lambda config: (
            f"tensor_model_parallel_size={config.tensor_model_parallel_size} with {config.num_query_groups} KV heads"
        ),
        "every rank needs the same whole number of KV heads; lower --tensor-model-parallel-size",
    ),
    Requirement(
        lambda config: config.kv_channels % 2 == 0 and config.kv_channels >= MIN_HEAD_DIM,
        lambda config: f"kv_channels={config.kv_channels}",
        f"the head dimension must be even and at least {MIN_HEAD_DIM}",
    ),
)


def check_model_config(model_config: Any) -> None:
    """Raise ``ValueError`` with every unmet requirement of a compressing model."""
    unmet = [rule for rule in REQUIREMENTS if not rule.holds(model_config)]
    if unmet:
        lines = [f"{rule.given(model_config)}: {rule.allowed}" for rule in unmet]
        raise ValueError("this model cannot be compressed:\n  " + "\n  ".join(lines))

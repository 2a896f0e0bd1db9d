"""Which settings of ``config.json`` mean what: read, harmless, harmless at one value, or unknown.

The lists are what transformers' Llama-like families and the configurations of published models declare, with the
marks that trainers and exporters leave. A setting is judged by what it would make a model compute, whoever wrote it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_dmc.models.families import Family

_READ = """
    model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
    vocab_size max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings
    torch_dtype dtype dmc layer_types
"""
READ_SETTINGS = frozenset(_READ.split())
"""Settings from which the model follows."""

_OFF = (False, None)
_NONE = (None,)
_ZERO = (0, 0.0, None)
_ONE = (1, 1.0, None)
_EMPTY: tuple[Any, ...] = (None, {}, [])

FIXED_SETTINGS: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu", "swish"),
    # Biases.
    **dict.fromkeys(("attention_bias", "mlp_bias", "attention_out_bias", "qkv_bias", "use_qkv_bias"), _OFF),
    **dict.fromkeys(("use_bias", "bias", "add_bias_linear"), _OFF),
    # Dropout, which a retrofit does without.
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout"), _ZERO),
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), _ZERO),
    # Positions.
    **dict.fromkeys(
        ("partial_rotary_factor", "rotary_pct", "rotary_percent", "rope_ratio", "rope_scaling_factor"), _ONE
    ),
    **dict.fromkeys(("rope_interleaved", "rope_interleave", "rotary_interleaved", "alibi"), _OFF),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), (*_EMPTY, 0)),
    **dict.fromkeys(("original_max_position_embeddings", "rope_scaling_type"), _NONE),
    # What a token sees.
    **dict.fromkeys(("sliding_window", "sliding_window_pattern", "attention_chunk_size"), _NONE),
    **dict.fromkeys(("use_sliding_window", "use_bidirectional_attention", "attn_temperature_tuning"), _OFF),
    # Other norms, scales and blocks.
    **dict.fromkeys(("qk_layernorm", "use_qk_norm", "qk_norm", "use_parallel_residual", "parallel_attn"), _OFF),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "lambda_std_dev"), _NONE),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale"), _ONE),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "clip_qkv"), _NONE),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), _NONE),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _ZERO),
    # Other programs than a language model's forward pass.
    **dict.fromkeys(("quantization_config", "text_config", "vision_config"), _NONE),
    **dict.fromkeys(("auto_map", "pruned_heads"), _EMPTY),
    **dict.fromkeys(("is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder"), _OFF),
    "cross_attention_hidden_size": _NONE,
}
"""Settings that must have one of these values (or be absent), because another would change the computation."""

_HARMLESS = """
    architectures transformers_version _name_or_path _model_name_or_path name_or_path _commit_hash _from_model_config
    model_name finetuning_task task_specific_params tokenizer_class prefix problem_type id2label label2id num_labels
    transformers.js_config is_llama_config unsloth_version unsloth_fixed keys_to_ignore_at_inference
    use_cache return_dict output_attentions output_hidden_states output_scores return_dict_in_generate torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing initializer_range pretraining_tp
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 use_sdpa
    max_window_layers max_sequence_length model_max_length router_aux_loss_coef output_router_logits
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id eod_token_id
    decoder_start_token_id forced_bos_token_id forced_eos_token_id
    max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values penalty_alpha
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
"""
HARMLESS_SETTINGS = frozenset(_HARMLESS.split())
"""Settings that say nothing about the computation of the next-token logits, whatever their value."""


def check_settings(given: Mapping[str, Any], family: Family, ignored: Collection[str] = ()) -> list[str]:
    """Refuse what would change the computation; what was passed over, in words.

    Args:
        given: ``config.json``.
        ignored: names of unknown settings that the user says change nothing.

    Raises:
        ValueError: a setting at a value that is not supported, or an unknown one with a value.
    """
    fixed = {**FIXED_SETTINGS, **family.fixed}
    fixed = {name: allowed for name, allowed in fixed.items() if name not in family.harmless}
    _check_fixed(given, fixed)
    known = READ_SETTINGS | HARMLESS_SETTINGS | fixed.keys() | set(family.harmless)
    notes, refused = [], []
    for name in sorted(given.keys() - known):
        if name in ignored:
            notes.append(f"config.json: the setting {name}={_short(given[name])} is ignored, as --ignore-setting says")
        elif given[name] is False or given[name] in (None, "", [], {}):
            notes.append(f"config.json: the unknown setting {name}={given[name]!r} is taken for one that is off")
        else:
            refused.append(name)
    if refused:
        values = ", ".join(f"{name}={_short(given[name])}" for name in refused)
        flags = " ".join(f"--ignore-setting {name}" for name in refused)
        raise ValueError(
            f"config.json: unknown settings {values}: they may change what the model computes; if they do not, remove "
            f"them from config.json, or import with {flags}"
        )
    return notes


def _check_fixed(given: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    for name, allowed in fixed.items():
        if name in given and not any(type(given[name]) is type(value) and given[name] == value for value in allowed):
            raise ValueError(
                f"config.json: {name}={_short(given[name])} is not supported (only {allowed[0]!r}): it changes what "
                "the model computes; use a checkpoint without it"
            )
    layer_types = given.get("layer_types")
    if layer_types is not None and any(kind != "full_attention" for kind in layer_types):
        raise ValueError(f"config.json: layer_types={_short(layer_types)}: every layer must be full_attention")


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."

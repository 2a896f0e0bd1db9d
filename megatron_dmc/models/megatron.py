"""A model in Megatron's words: one row per setting, read in every direction.

From ``SETTINGS`` come the arguments that are saved with a checkpoint, the model that is found in them again
(``checkpoint.saved_arguments``), the flags of a training run (``training.model_flags``), the keywords that build
Megatron's own layers, and what a compressing model with another value is told (``training.model.requirements``).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from megatron_dmc.models.config import ModelConfig
from megatron_dmc.ops.rope import RopeScaling


class Setting(NamedTuple):
    """One of Megatron's arguments that follows from a model.

    Attributes:
        argument: attribute of Megatron's arguments, in the running process and in checkpoints.
        value: its value for a model.
        field: of ModelConfig, where the argument alone tells it.
        fixed: every model has the same value; a checkpoint that says otherwise is another kind of model.
        default: value of a checkpoint without the argument, at which its flag may be left out; of every model if fixed.
        flag: on the command line; of a boolean, given where the value is ``switch``.
        transformer: keyword and attribute of Megatron's TransformerConfig.
        gpt: keyword of Megatron's GPTModel and attribute of its model configuration.
        former: name of the argument up to core 0.18.
        remedy: what to do about another value in training.
    """

    argument: str
    value: Callable[[ModelConfig], Any]
    field: str | None = None
    fixed: bool = False
    default: Any = None
    flag: str | None = None
    switch: bool = True
    transformer: str | None = None
    gpt: str | None = None
    former: str | None = None
    remedy: str | None = None

    @property
    def attribute(self) -> str:
        """Its name in Megatron's model configuration."""
        name = self.transformer or self.gpt
        assert name is not None
        return name

    def has(self, given: Any) -> bool:
        """Whether ``given`` is the value of a fixed setting; unset, None, False and zero are alike."""
        return given == self.default or not (given or self.default)


def _field(argument: str, field: str | None = None, **more: Any) -> Setting:
    """A field of ModelConfig; its flag has the argument's name unless another is given."""
    field = field or argument
    value = more.pop("value", operator.attrgetter(field))
    return Setting(argument, value, field, **{"flag": _flag_of(argument)} | more)


def _layer(argument: str, field: str | None = None, **more: Any) -> Setting:
    """The same, of Megatron's transformer layers."""
    return _field(argument, field, **{"transformer": argument} | more)


def _fixed(argument: str, value: Any, **more: Any) -> Setting:
    return Setting(argument, lambda _: value, fixed=True, default=value, **more)


def _flag_of(argument: str) -> str:
    return "--" + argument.replace("_", "-")


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name}={value}: Megatron takes this rotary setting only as a whole number")
    return int(value)


_LLAMA3 = RopeScaling("llama3", 8.0)
"""Megatron has a flag for the factor; the other numbers are constants of its code."""


def _llama3(config: ModelConfig) -> RopeScaling | None:
    scaling = config.rope_scaling
    return scaling if scaling is not None and scaling.rope_type == "llama3" else None


def _linear_factor(config: ModelConfig) -> int | None:
    scaling = config.rope_scaling
    return _whole("rope_scaling", scaling.factor) if scaling is not None and scaling.rope_type == "linear" else None


_LLAMA3_NUMBERS = {
    "rope_scaling_factor": "factor",
    "dmc_rope_low_freq_factor": "low_freq_factor",
    "dmc_rope_high_freq_factor": "high_freq_factor",
    "dmc_rope_original_positions": "original_max_position_embeddings",
}


def _llama3_number(argument: str, gpt: str | None = None) -> Setting:
    value = operator.attrgetter(_LLAMA3_NUMBERS[argument])
    flag, default = _flag_of(argument), value(_LLAMA3)
    return Setting(argument, lambda config: value(_llama3(config) or _LLAMA3), default=default, flag=flag, gpt=gpt)


SETTINGS = (
    _layer("num_layers"),
    _layer("hidden_size"),
    _layer("ffn_hidden_size"),
    _layer("num_attention_heads"),
    _layer("kv_channels", "head_dim"),
    Setting("group_query_attention", lambda _: True, flag="--group-query-attention"),
    _layer("num_query_groups", "num_kv_heads"),
    _layer("layernorm_epsilon", "rms_norm_eps", flag="--norm-epsilon", former="norm_epsilon"),
    _layer("qk_layernorm", "qk_norm", default=False),
    _field("max_position_embeddings", gpt="max_sequence_length"),
    _field("vocab_size"),
    Setting(
        "untie_embeddings_and_output_weights",
        lambda config: not config.tie_word_embeddings,
        flag="--untie-embeddings-and-output-weights",
    ),
    _field("dmc_model_family", "family", default="llama"),
    # The positions.
    Setting(
        "rotary_base",
        lambda config: _whole("rope_theta", config.rope_theta),
        default=10000,
        flag="--rotary-base",
        gpt="rotary_base",
    ),
    Setting(
        "rotary_seq_len_interpolation_factor",
        _linear_factor,
        flag="--rotary-seq-len-interpolation-factor",
        gpt="seq_len_interpolation_factor",
    ),
    Setting(
        "use_rope_scaling",
        lambda config: _llama3(config) is not None,
        default=False,
        flag="--use-rope-scaling",
        gpt="rope_scaling",
    ),
    _llama3_number("rope_scaling_factor", gpt="rope_scaling_factor"),
    _llama3_number("dmc_rope_low_freq_factor"),
    _llama3_number("dmc_rope_high_freq_factor"),
    _llama3_number("dmc_rope_original_positions"),
    # How the weights are stored.
    Setting("params_dtype", lambda config: config.dtype),
    Setting("bf16", lambda config: config.dtype == "bfloat16"),
    Setting("fp16", lambda config: config.dtype == "float16"),
    # What the block is, in every family.
    _fixed(
        "normalization", "RMSNorm", flag="--normalization", transformer="normalization",
        remedy="the block's norm; use --normalization RMSNorm",
    ),
    _fixed("swiglu", True, flag="--swiglu", transformer="gated_linear_unit"),
    _fixed("squared_relu", False),
    _fixed("add_bias_linear", False, flag="--disable-bias-linear", switch=False, transformer="add_bias_linear"),
    _fixed("add_qkv_bias", False, transformer="add_qkv_bias"),
    _fixed("apply_layernorm_1p", False),
    _fixed("layernorm_zero_centered_gamma", False, transformer="layernorm_zero_centered_gamma"),
    _fixed("apply_residual_connection_post_layernorm", False, transformer="apply_residual_connection_post_layernorm"),
    _fixed("apply_query_key_layer_scaling", False, transformer="apply_query_key_layer_scaling"),
    _fixed(
        "position_embedding_type", "rope", flag="--position-embedding-type", gpt="position_embedding_type",
        remedy="keys are rotated after pooling; use --position-embedding-type rope",
    ),
    _fixed(
        "rotary_percent", 1.0, gpt="rotary_percent",
        remedy="rotary embeddings cover the whole head; use --rotary-percent 1.0",
    ),
    _fixed(
        "rotary_interleaved", False, transformer="rotary_interleaved",
        remedy="halves are rotated; remove --rotary-interleaved",
    ),
    _fixed(
        "no_rope_freq", None, transformer="no_rope_freq",
        remedy="every layer rotates its keys; remove --no-rope-freq",
    ),
    _fixed(
        "window_size", None, transformer="window_size",
        remedy="sliding windows are not supported; remove --window-size",
    ),
    _fixed(
        "softmax_type", "vanilla", transformer="softmax_type",
        remedy="attention sinks are not supported; use --softmax-type vanilla",
    ),
    _fixed(
        "attention_output_gate", False, transformer="attention_output_gate",
        remedy="no part of the block; remove --attention-output-gate",
    ),
    _fixed(
        "multi_latent_attention", False, transformer="multi_latent_attention",
        remedy="only multi-head and grouped-query attention compress; remove it",
    ),
    _fixed(
        "experimental_attention_variant", None, transformer="experimental_attention_variant",
        remedy="only softmax attention compresses; remove the flag",
    ),
    _fixed("linear_attention_freq", None),
    _fixed(
        "mtp_num_layers", None, transformer="mtp_num_layers",
        remedy="multi-token prediction is not supported; remove --mtp-num-layers",
    ),
    _fixed(
        "num_experts", None, transformer="num_moe_experts",
        remedy="mixtures of experts are not supported; remove --num-experts",
    ),
    _fixed("heterogeneous_layers_config_path", None),
    _fixed("use_mup", False, transformer="use_mup", remedy="it rescales attention; remove --use-mup"),
)  # fmt: skip

# Not a matter of the model, but Megatron's own defaults would sabotage the retrofit of a trained one.
WITHOUT_DROPOUT = (
    _fixed(
        "attention_dropout", 0.0, flag="--attention-dropout", transformer="attention_dropout",
        remedy="use --attention-dropout 0",
    ),
    _fixed("hidden_dropout", 0.0, flag="--hidden-dropout", transformer="hidden_dropout"),
)  # fmt: skip

ALL_SETTINGS = SETTINGS + WITHOUT_DROPOUT

# Older spellings of position_embedding_type that Megatron still reads.
_FORMER_POSITIONS = {"use_rotary_position_embeddings": True, "add_position_embedding": False}


def megatron_arguments(config: ModelConfig) -> dict[str, Any]:
    """Megatron's arguments (by attribute name) that build a model.

    Raises:
        ValueError: a rotary base or scaling that Megatron's arguments cannot express.
    """
    return {setting.argument: setting.value(config) for setting in ALL_SETTINGS} | _FORMER_POSITIONS


def transformer_keywords(config: ModelConfig) -> dict[str, Any]:
    """Keywords of Megatron's TransformerConfig for a model."""
    return _keywords(config, "transformer")


def gpt_keywords(config: ModelConfig) -> dict[str, Any]:
    """Keywords of Megatron's GPTModel for a model, beside its configuration, specification and vocabulary."""
    return _keywords(config, "gpt") | {"share_embeddings_and_output_weights": config.tie_word_embeddings}


def _keywords(config: ModelConfig, which: str) -> dict[str, Any]:
    return {name: setting.value(config) for setting in ALL_SETTINGS if (name := getattr(setting, which)) is not None}


def is_stock(config: ModelConfig) -> bool:
    """Whether Megatron's own rotary embedding has the frequencies of a model."""
    scaling = _llama3(config)
    return scaling is None or scaling == dataclasses.replace(_LLAMA3, factor=scaling.factor)


def refuse_for_stock(config: ModelConfig) -> None:
    """Raise ``ValueError`` for a model that Megatron's own layers cannot compute; compressing attention can."""
    if not is_stock(config):
        raise ValueError(
            f"{config.rope_scaling}: Megatron's own model fixes all but the factor (low_freq_factor=1, "
            "high_freq_factor=4, original_max_position_embeddings=8192); only compressing stages train this model"
        )


def scaling_from_arguments(args: Mapping[str, Any]) -> RopeScaling | None:
    """How the rotary frequencies of a model are stretched. Raises ``ValueError`` on what is not a number."""
    if args.get("use_rope_scaling"):
        numbers = {
            name: number_of(args, argument, getattr(_LLAMA3, name)) for argument, name in _LLAMA3_NUMBERS.items()
        }
        return RopeScaling("llama3", **numbers)
    if args.get("rotary_seq_len_interpolation_factor"):
        return RopeScaling("linear", number_of(args, "rotary_seq_len_interpolation_factor", 1.0))
    return None


def number_of(args: Mapping[str, Any], argument: str, default: float | int) -> Any:
    """A saved number in the type of its default. Raises ``ValueError`` on anything else."""
    value = args.get(argument, default)
    if type(value) not in (int, float):
        raise ValueError(f"the saved argument {argument} is {value!r}: a number is expected")
    return type(default)(value)

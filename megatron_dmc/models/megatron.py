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
from megatron_dmc.ops.rope_scaling import RopeScaling


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


def _derived(argument: str, value: Callable[[ModelConfig], Any], **more: Any) -> Setting:
    """An argument whose flag has its name unless another is given."""
    return Setting(argument, value, **{"flag": "--" + argument.replace("_", "-")} | more)


def _field(argument: str, field: str | None = None, **more: Any) -> Setting:
    """A field of ModelConfig."""
    field = field or argument
    return _derived(argument, operator.attrgetter(field), field=field, **more)


def _layer(argument: str, field: str | None = None, **more: Any) -> Setting:
    """A field of ModelConfig that Megatron's transformer layers ask for."""
    return _field(argument, field, transformer=argument, **more)


def _fixed(argument: str, value: Any, remedy: str | None = None, **more: Any) -> Setting:
    return Setting(argument, lambda _: value, fixed=True, default=value, remedy=remedy, **more)


def _block(argument: str, value: Any, remedy: str | None = None, **more: Any) -> Setting:
    """A fixed value that Megatron's transformer layers ask for."""
    return _fixed(argument, value, remedy, **{"transformer": argument} | more)


_LLAMA3 = RopeScaling("llama3", 8.0)
"""Megatron has a flag for the factor; the other numbers are constants of its code."""

_LLAMA3_NUMBERS = {
    "rope_scaling_factor": "factor",
    "dmc_rope_low_freq_factor": "low_freq_factor",
    "dmc_rope_high_freq_factor": "high_freq_factor",
    "dmc_rope_original_positions": "original_max_position_embeddings",
}


def _llama3_number(argument: str, **more: Any) -> Setting:
    number = operator.attrgetter(_LLAMA3_NUMBERS[argument])
    return _derived(argument, lambda config: number(_llama3(config) or _LLAMA3), default=number(_LLAMA3), **more)


def _llama3(config: ModelConfig) -> RopeScaling | None:
    scaling = config.rope_scaling
    return scaling if scaling is not None and scaling.rope_type == "llama3" else None


def _linear_factor(config: ModelConfig) -> int | None:
    scaling = config.rope_scaling
    return _whole("rope_scaling", scaling.factor) if scaling is not None and scaling.rope_type == "linear" else None


def _base(config: ModelConfig) -> int:
    return _whole("rope_theta", config.rope_theta)


def _whole(name: str, value: float) -> int:
    if value != int(value):
        raise ValueError(f"{name}={value}: Megatron takes this rotary setting only as a whole number")
    return int(value)


SETTINGS = (
    _layer("num_layers"),
    _layer("hidden_size"),
    _layer("ffn_hidden_size"),
    _layer("num_attention_heads"),
    _layer("kv_channels", "head_dim"),
    _derived("group_query_attention", lambda _: True),
    _layer("num_query_groups", "num_kv_heads"),
    _layer("layernorm_epsilon", "rms_norm_eps", flag="--norm-epsilon", former="norm_epsilon"),
    _layer("qk_layernorm", "qk_norm", default=False),
    _layer("add_qkv_bias", "qkv_bias", default=False),
    _field("max_position_embeddings", gpt="max_sequence_length"),
    _field("vocab_size"),
    _field("dmc_model_family", "family", default="llama"),
    _derived("untie_embeddings_and_output_weights", lambda config: not config.tie_word_embeddings),
    # Positions.
    _derived("rotary_base", _base, default=10000, gpt="rotary_base"),
    _derived("rotary_seq_len_interpolation_factor", _linear_factor, gpt="seq_len_interpolation_factor"),
    _derived("use_rope_scaling", lambda config: _llama3(config) is not None, default=False, gpt="rope_scaling"),
    _llama3_number("rope_scaling_factor", gpt="rope_scaling_factor"),
    _llama3_number("dmc_rope_low_freq_factor"),
    _llama3_number("dmc_rope_high_freq_factor"),
    _llama3_number("dmc_rope_original_positions"),
    _fixed(
        "position_embedding_type", "rope", "keys are rotated after pooling; use --position-embedding-type rope",
        flag="--position-embedding-type", gpt="position_embedding_type",
    ),
    _fixed("rotary_percent", 1.0, "the whole head is rotated; use --rotary-percent 1.0", gpt="rotary_percent"),
    _block("rotary_interleaved", False, "halves are rotated; remove --rotary-interleaved"),
    _block("no_rope_freq", None, "every layer rotates its keys; remove --no-rope-freq"),
    # How the weights are stored.
    _derived("params_dtype", lambda config: config.dtype, flag=None),
    _derived("bf16", lambda config: config.dtype == "bfloat16", flag=None),
    _derived("fp16", lambda config: config.dtype == "float16", flag=None),
    # What the block is, in every family.
    _block("normalization", "RMSNorm", "the block's norm; use --normalization RMSNorm", flag="--normalization"),
    _block("swiglu", True, flag="--swiglu", transformer="gated_linear_unit"),
    _block("add_bias_linear", False, flag="--disable-bias-linear", switch=False),
    _block("layernorm_zero_centered_gamma", False),
    _block("apply_residual_connection_post_layernorm", False),
    _block("apply_query_key_layer_scaling", False),
    _block("window_size", None, "sliding windows are not supported; remove --window-size"),
    _block("softmax_type", "vanilla", "attention sinks are not supported; use --softmax-type vanilla"),
    _block("attention_output_gate", False, "no part of the block; remove --attention-output-gate"),
    _block("multi_latent_attention", False, "only multi-head and grouped-query attention compress; remove it"),
    _block("experimental_attention_variant", None, "only softmax attention compresses; remove the flag"),
    _block("mtp_num_layers", None, "multi-token prediction is not supported; remove --mtp-num-layers"),
    _block(
        "num_experts", None, "mixtures of experts are not supported; remove --num-experts",
        transformer="num_moe_experts",
    ),
    _block("use_mup", False, "it rescales attention; remove --use-mup"),
    _fixed("squared_relu", False),
    _fixed("apply_layernorm_1p", False),
    _fixed("linear_attention_freq", None),
    _fixed("heterogeneous_layers_config_path", None),
)  # fmt: skip

# Not a matter of the model, but Megatron's own defaults would sabotage the retrofit of a trained one.
WITHOUT_DROPOUT = (
    _block("attention_dropout", 0.0, "use --attention-dropout 0", flag="--attention-dropout"),
    _block("hidden_dropout", 0.0, flag="--hidden-dropout"),
)

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

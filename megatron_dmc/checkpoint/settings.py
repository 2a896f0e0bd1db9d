"""Megatron's saved arguments and the model they describe: one table, read in both directions.

Megatron keeps its whole argument namespace in a checkpoint. :func:`megatron_arguments` gives the part of it that a
Llama determines, for imports and for training; :func:`read_megatron_settings` finds the Llama again. DMC's settings
are in the namespace as ``dmc_<field>`` with ``dmc_schema_version``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.locate import LEGACY, TORCH_DIST, locate
from megatron_dmc.checkpoint.pickles import Name, Record
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.config import SCHEMA_VERSION, DMCConfig
from megatron_dmc.models.config import ModelConfig, RopeScaling

DMC_PREFIX = "dmc_"
SCHEMA_ARGUMENT = "dmc_schema_version"

# Megatron's arguments that name a field of ModelConfig directly.
_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_kv_heads",
    "kv_channels": "head_dim",
    "ffn_hidden_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}

# Arguments with one value for every Llama. A checkpoint that says otherwise is another model.
LLAMA_ARGUMENTS: dict[str, Any] = {
    "position_embedding_type": "rope",
    "use_rotary_position_embeddings": True,
    "add_position_embedding": False,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "swiglu": True,
    "squared_relu": False,
    "normalization": "RMSNorm",
    "apply_layernorm_1p": False,
    "qk_layernorm": False,
    "apply_query_key_layer_scaling": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "mtp_num_layers": None,
    "softmax_type": "vanilla",
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "no_rope_freq": None,
    "linear_attention_freq": None,
    "experimental_attention_variant": None,
    "heterogeneous_layers_config_path": None,
    "use_mup": False,
    "window_size": None,
    "attention_output_gate": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
}
# These two change training only; a checkpoint trained with dropout is still a Llama. Megatron reads
# use_rotary_position_embeddings as an older spelling of position_embedding_type, and keeps add_position_embedding
# at its default.
_NOT_CHECKED = frozenset(
    {"attention_dropout", "hidden_dropout", "use_rotary_position_embeddings", "add_position_embedding"}
)

# Megatron has no arguments for these three numbers of Llama 3's scaling; they are constants of its code.
_LLAMA3_CONSTANTS = RopeScaling("llama3", 1.0)


class MegatronSettings(NamedTuple):
    """What a Megatron checkpoint says about itself."""

    iteration: int
    args: dict[str, Any]
    dmc: DMCConfig | None
    config: ModelConfig


def read_megatron_settings(path: Path | str) -> MegatronSettings:
    """Iteration, saved arguments, DMC settings (None: the checkpoint has none) and shape of a Megatron checkpoint.

    Args:
        path: a ``--save`` directory, or one iteration in it.

    Raises:
        ValueError: no Megatron checkpoint, one that is damaged or not a Llama, or settings of another schema.
    """
    location = locate(path)
    if location.format not in (TORCH_DIST, LEGACY):
        raise ValueError(f"{path} is a Hugging Face model: convert it first (megatron-dmc convert import)")
    if location.format == TORCH_DIST:
        checkpoint = TorchDistCheckpoint(location.directory)
        state, padded = checkpoint.common_state(), _padded_vocabulary(checkpoint)
    else:
        legacy = LegacyCheckpoint(location.directory)
        state, padded = legacy.common_state(), legacy.padded_vocab_size()
    return settings_from_state(state, padded, str(path), location.iteration)


def settings_from_state(
    state: Mapping[str, Any], padded_vocab_size: int, what: str, iteration: int
) -> MegatronSettings:
    """As :func:`read_megatron_settings`, from a common state that was read before."""
    args = namespace_dict(state.get("args"), what)
    stored = state.get("iteration", iteration)
    config = llama_from_arguments(args, padded_vocab_size, what)
    return MegatronSettings(stored if type(stored) is int else iteration, args, dmc_from_arguments(args, what), config)


def namespace_dict(namespace: Any, what: str) -> dict[str, Any]:
    """Saved arguments as a plain dictionary; enumerations become their value, number types their name."""
    if not isinstance(namespace, Record) or not isinstance(namespace.state, dict):
        raise ValueError(f"{what} holds no saved arguments ('args'): it was not written by Megatron's training")
    return {str(name): _plain(value) for name, value in namespace.state.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Name):
        return value.name.removeprefix("torch.")
    if isinstance(value, Record):
        return value.args[0] if len(value.args) == 1 else value.args
    return value


def megatron_arguments(config: ModelConfig) -> dict[str, Any]:
    """Megatron's arguments (by attribute name) that build this Llama.

    Raises:
        ValueError: a rotary base or scaling that Megatron core cannot express.
    """
    arguments = {argument: getattr(config, field) for argument, field in _FIELDS.items()} | LLAMA_ARGUMENTS
    if config.rope_theta != int(config.rope_theta):
        raise ValueError(f"rope_theta={config.rope_theta}: Megatron's --rotary-base takes whole numbers only")
    arguments |= {
        "group_query_attention": config.num_kv_heads != config.num_attention_heads,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "rotary_base": int(config.rope_theta),
        "rotary_seq_len_interpolation_factor": None,
        "use_rope_scaling": False,
        "rope_scaling_factor": 8.0,
        "params_dtype": config.dtype,
        "bf16": config.dtype == "bfloat16",
        "fp16": config.dtype == "float16",
    }
    return arguments | _scaling_arguments(config.rope_scaling)


def _scaling_arguments(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    if scaling.rope_type == "linear":
        if scaling.factor != int(scaling.factor):
            raise ValueError(f"linear rope scaling by {scaling.factor}: Megatron takes whole factors only")
        return {"rotary_seq_len_interpolation_factor": int(scaling.factor)}
    constants = dataclasses.replace(_LLAMA3_CONSTANTS, factor=scaling.factor)
    if scaling != constants:
        raise ValueError(
            f"llama3 rope scaling {scaling}: Megatron core fixes all but the factor (low_freq_factor=1, "
            "high_freq_factor=4, original_max_position_embeddings=8192)"
        )
    return {"use_rope_scaling": True, "rope_scaling_factor": scaling.factor}


def llama_from_arguments(args: Mapping[str, Any], padded_vocab_size: int, what: str) -> ModelConfig:
    """The Llama that saved arguments describe; the inverse of :func:`megatron_arguments`.

    ``vocab_size`` is the saved one; where Megatron saved none, the padded size stands for it.

    Raises:
        ValueError: another model than a Llama (the argument is named), or a missing argument.
    """
    for name, value in LLAMA_ARGUMENTS.items():
        if name not in _NOT_CHECKED and args.get(name, value) != value:
            raise ValueError(f"{what} was trained with {name}={args[name]!r}: a Llama has {value!r}")
    values: dict[str, Any] = {field: args.get(argument) for argument, field in _FIELDS.items()}
    if values["rms_norm_eps"] is None:
        values["rms_norm_eps"] = args.get("norm_epsilon")  # its name up to core 0.18
    heads = values["num_attention_heads"]
    if not args.get("group_query_attention") or values["num_kv_heads"] is None:
        values["num_kv_heads"] = heads
    if values["vocab_size"] is None:
        values["vocab_size"] = padded_vocab_size
    missing = sorted(field for field, value in values.items() if type(value) not in (int, float))
    if missing:
        raise ValueError(f"{what}: the saved arguments do not state {', '.join(missing)}")
    if values["vocab_size"] > padded_vocab_size:
        raise ValueError(
            f"{what}: vocab_size={values['vocab_size']} exceeds the {padded_vocab_size} rows of its embedding"
        )
    factor = args.get("rotary_seq_len_interpolation_factor")
    scaling = RopeScaling("linear", float(factor)) if factor is not None else None
    if args.get("use_rope_scaling"):
        scaling = dataclasses.replace(_LLAMA3_CONSTANTS, factor=float(args.get("rope_scaling_factor", 8.0)))
    return ModelConfig(
        **values,
        rope_theta=float(args.get("rotary_base", 10000)),
        rope_scaling=scaling,
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights"),
        dtype=_dtype(args),
    )


def dmc_arguments(dmc: DMCConfig) -> dict[str, Any]:
    """DMC's settings as they are saved beside Megatron's arguments."""
    return {DMC_PREFIX + name: value for name, value in dmc.to_dict().items()}


def dmc_from_arguments(args: Mapping[str, Any], what: str) -> DMCConfig | None:
    """The DMC settings in saved arguments; None where there are none."""
    if SCHEMA_ARGUMENT not in args:
        return None
    names = {"schema_version", *(field.name for field in dataclasses.fields(DMCConfig))}
    stored = {name: args[DMC_PREFIX + name] for name in sorted(names) if DMC_PREFIX + name in args}
    if stored["schema_version"] == SCHEMA_VERSION and stored.keys() != names:
        raise ValueError(f"{what}: the saved DMC settings lack {', '.join(sorted(names - stored.keys()))}")
    return DMCConfig.from_dict(stored)


def _dtype(args: Mapping[str, Any]) -> str:
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if args.get(flag):
            return name
    return "float32"


def _padded_vocabulary(checkpoint: TorchDistCheckpoint) -> int:
    embedding = checkpoint.tensors.get("embedding.word_embeddings.weight")
    if embedding is None:
        raise ValueError(f"{checkpoint.directory} holds no embedding.word_embeddings.weight: not a Llama of Megatron")
    return embedding.shape[0]

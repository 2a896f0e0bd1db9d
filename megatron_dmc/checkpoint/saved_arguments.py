"""What a Megatron checkpoint says about itself: its saved arguments, and the model and settings of DMC in them.

Megatron keeps its whole argument namespace in a checkpoint. The table of those that a model determines is
``models.megatron``; DMC's settings are in the namespace as ``dmc_<field>`` with ``dmc_schema_version``.
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
from megatron_dmc.config import SCHEMA_VERSION, SINCE_2, DMCConfig, has_adapter
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import FAMILIES, Family, family_of
from megatron_dmc.models.megatron import SETTINGS, Setting, number_of, scaling_from_arguments
from megatron_dmc.models.tensors import EMBEDDING

DMC_PREFIX = "dmc_"
SCHEMA_ARGUMENT = "dmc_schema_version"

_NUMBER = (int, float)
_OF_FAMILY = ("qk_norm", "qkv_bias")
"""Fields that a family determines."""
_FAMILY_ARGUMENT = "dmc_model_family"
_TYPES: dict[str, tuple[type, ...]] = {"family": (str,)} | dict.fromkeys(_OF_FAMILY, (bool,))
"""Of fields that are no numbers."""


class SavedArguments(NamedTuple):
    """What a Megatron checkpoint says about itself."""

    iteration: int
    args: dict[str, Any]
    dmc: DMCConfig | None
    config: ModelConfig


def read_saved_arguments(path: Path | str) -> SavedArguments:
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
    return arguments_from_state(state, padded, str(path), location.iteration)


def arguments_from_state(state: Mapping[str, Any], padded_vocab_size: int, what: str, iteration: int) -> SavedArguments:
    """As :func:`read_saved_arguments`, from a common state that was read before."""
    args = namespace_dict(state.get("args"), what)
    stored = state.get("iteration", iteration)
    dmc = dmc_from_arguments(args, what)
    config = config_from_arguments(args, padded_vocab_size, what)
    config = dataclasses.replace(config, adapter=has_adapter(dmc))
    return SavedArguments(stored if type(stored) is int else iteration, args, dmc, config)


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


def config_from_arguments(args: Mapping[str, Any], padded_vocab_size: int, what: str) -> ModelConfig:
    """The model that saved arguments describe; the inverse of :func:`megatron_dmc.models.megatron.megatron_arguments`.

    ``vocab_size`` is the saved one; where Megatron saved none, the padded size stands for it. Where no family is named,
    which only ``megatron-dmc`` does, it is the first one with the model's block.

    Raises:
        ValueError: another kind of model (the argument is named), or a missing argument.
    """
    for setting in SETTINGS:
        if setting.fixed and not setting.has(args.get(setting.argument, setting.default)):
            raise ValueError(
                f"{what} was trained with {setting.argument}={args[setting.argument]!r}: only {setting.default!r} is "
                "supported"
            )
    values = _field_values(args, padded_vocab_size, what)
    if values["vocab_size"] > padded_vocab_size:
        raise ValueError(
            f"{what}: vocab_size={values['vocab_size']} exceeds the {padded_vocab_size} rows of its embedding"
        )
    values["family"] = _family(args, {field: values[field] for field in _OF_FAMILY}, what).name
    return ModelConfig(
        **values,
        rope_theta=number_of(args, "rotary_base", 10000.0),
        rope_scaling=scaling_from_arguments(args),
        tie_word_embeddings=not args.get("untie_embeddings_and_output_weights"),
        dtype=next((name for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")) if args.get(flag)), "float32"),
    )


def _family(args: Mapping[str, Any], block: dict[str, bool], what: str) -> Family:
    """The family that saved arguments name; where they name none, as Megatron's own, the first one with its block."""
    named = args.get(_FAMILY_ARGUMENT)
    for family in FAMILIES.values() if named is None else [family_of(named)]:
        if all(getattr(family, field) == value for field, value in block.items()):
            return family
    stated = ", ".join(f"{setting.argument}={block[setting.field]}" for setting in SETTINGS if setting.field in block)
    whose = "no family that is known is" if named is None else f"models of the family {named} are not"
    raise ValueError(f"{what} was trained with {stated}: {whose} made so")


def _field_values(args: Mapping[str, Any], padded_vocab_size: int, what: str) -> dict[str, Any]:
    """Values of the fields of ModelConfig that are arguments of their own."""
    values = {setting.field: _saved(args, setting) for setting in SETTINGS if setting.field is not None}
    if not args.get("group_query_attention") or values["num_kv_heads"] is None:
        values["num_kv_heads"] = values["num_attention_heads"]
    if values["vocab_size"] is None:
        values["vocab_size"] = padded_vocab_size
    missing = sorted(field for field, value in values.items() if type(value) not in _TYPES.get(field, _NUMBER))
    if missing:
        raise ValueError(f"{what}: the saved arguments do not state {', '.join(missing)}")
    return values


def _saved(args: Mapping[str, Any], setting: Setting) -> Any:
    value = args.get(setting.argument)
    if value is None and setting.former is not None:
        value = args.get(setting.former)
    return setting.default if value is None else value


def dmc_arguments(dmc: DMCConfig) -> dict[str, Any]:
    """DMC's settings as they are saved beside Megatron's arguments."""
    return {DMC_PREFIX + name: value for name, value in dmc.to_dict().items()}


def dmc_from_arguments(args: Mapping[str, Any], what: str) -> DMCConfig | None:
    """The DMC settings in saved arguments; None where there are none."""
    if SCHEMA_ARGUMENT not in args:
        return None
    names = {"schema_version", *(field.name for field in dataclasses.fields(DMCConfig))}
    stored = {name: args[DMC_PREFIX + name] for name in sorted(names) if DMC_PREFIX + name in args}
    if stored["schema_version"] == 1:
        names = names.difference(SINCE_2)
    if stored["schema_version"] in (1, SCHEMA_VERSION) and stored.keys() != names:
        raise ValueError(f"{what}: the saved DMC settings lack {', '.join(sorted(names - stored.keys()))}")
    return DMCConfig.from_dict(stored)


def _padded_vocabulary(checkpoint: TorchDistCheckpoint) -> int:
    embedding = checkpoint.tensors.get(EMBEDDING)
    if embedding is None:
        raise ValueError(f"{checkpoint.directory} holds no {EMBEDDING}: not a language model of Megatron")
    return embedding.shape[0]

"""Command-line flags of DMC, generated from :class:`DMCConfig`, and Megatron's defaults for a Llama."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_dmc.config import SCHEMA_VERSION, DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.stages import Stage

LLAMA_ARGUMENTS: dict[str, str | None] = {
    "--hidden-dropout": "0.0",
    "--attention-dropout": "0.0",
    "--disable-bias-linear": None,
    "--normalization": "RMSNorm",
    "--swiglu": None,
    "--position-embedding-type": "rope",
    "--dataloader-type": "single",
    "--no-create-attention-mask-in-dataloader": None,
    "--adam-beta1": "0.9",
    "--adam-beta2": "0.95",
    "--weight-decay": "0.1",
    "--clip-grad": "1.0",
    "--eval-interval": "1000",
    "--log-interval": "10",
}
"""Megatron flags whose own defaults would sabotage the retrofit of a Llama; None marks a switch."""

HOST_FLAGS: dict[str, str | None] = {
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    "--use-cpu-initialization": None,
    "--no-persist-layer-norm": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
    "--no-bias-gelu-fusion": None,
    "--no-bias-swiglu-fusion": None,
    "--no-bias-dropout-fusion": None,
    "--no-rope-fusion": None,
    "--num-workers": "0",
}
"""Megatron flags that select code without CUDA extensions, for a machine without a GPU."""

EXTENSION_FREE_FLAGS: dict[str, str | None] = {
    "--transformer-impl": "local",
    "--no-persist-layer-norm": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
}
"""Megatron flags for a GPU without Transformer Engine and apex."""

_OWN_SPECIFICATION = "leave it out: attention, and the specification of layers, are ours"
_OWN_DOCUMENTS = "separate documents by --dataloader-inter-document-masking"
_OWN_SHARDING = "shard the optimizer with --use-distributed-optimizer"

REFUSED_FLAGS: dict[str, str] = {
    "--attention-backend local": "it would replace compressing attention in silence; leave --attention-backend out",
    "--spec": _OWN_SPECIFICATION,
    "--multi-latent-attention": "only multi-head and grouped-query attention compress",
    "--qk-clip": "attention logits are never materialized",
    "--log-max-attention-logit": "attention logits are never materialized",
    "--hybrid-context-parallel": "use --context-parallel-size alone",
    "--use-megatron-fsdp": _OWN_SHARDING,
    "--use-torch-fsdp2": _OWN_SHARDING,
    "--freeze-all-layers": "freezing and LoRA do not exist here, all weights train",
    "--sft": "train on an indexed data set",
    "--reset-attention-mask": _OWN_DOCUMENTS,
    "--reset-position-ids": _OWN_DOCUMENTS,
}
"""Megatron flags that a compressing model cannot serve, and what to do instead. ``model.requirements`` refuses what
can be seen in the model's configuration; these never reach it, or Megatron answers first and speaks of other things."""

REFUSED_FLAGS_PLAIN: dict[str, str] = {
    "--dataloader-inter-document-masking": "packed sequences need Transformer Engine's attention, which this release "
    "does not drive; train the control without it",
}
"""The same for a stage that trains Megatron's own model."""


def refuse_flags(argv: list[str], stage: Stage) -> None:
    """Raise ``ValueError`` for a flag that the model of a stage cannot serve."""
    given = f" {' '.join(argv)} ".replace("=", " ")
    for flag, remedy in (REFUSED_FLAGS if stage.borrows_channel else REFUSED_FLAGS_PLAIN).items():
        if f" {flag} " in given:
            raise ValueError(f"{flag}: not supported with --dmc-stage {stage.name}; {remedy}")


def add_dmc_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add every field of :class:`DMCConfig` as ``--dmc-<field>``, and the flags of a run.

    Megatron calls this as ``extra_args_provider``.
    """
    group = parser.add_argument_group("Dynamic Memory Compression")
    for field in dataclasses.fields(DMCConfig):
        meta = field.metadata
        unit = f" [{meta['unit']}]" if meta["unit"] else ""
        group.add_argument(
            "--dmc-" + field.name.replace("_", "-"),
            type=float if field.default is None else type(field.default),
            default=field.default,
            choices=meta["choices"],
            help=f"{meta['help']}{unit}; source: {meta['source']} (default: {field.default})".replace("%", "%%"),
        )
    group.add_argument(
        "--dmc-total-samples",
        type=int,
        help="train samples [sequences] of the whole recipe, all stages: fixes one data order for every stage",
    )
    group.add_argument(
        "--dmc-first-sample",
        type=int,
        help="position in that order [sequences] where this stage starts; default: where the loaded stage stopped",
    )
    group.add_argument(
        "--dmc-stop-file",
        help="save and leave after the step during which this file appears; remove it before the run continues",
    )
    parser.set_defaults(dmc_schema_version=SCHEMA_VERSION)
    return parser


def dmc_config_from_args(args: Any) -> DMCConfig:
    """The settings among Megatron's arguments. Raises ``ValueError`` on a value outside its range."""
    return DMCConfig(**{field.name: getattr(args, f"dmc_{field.name}") for field in dataclasses.fields(DMCConfig)})


def dmc_flags(settings: DMCConfig) -> dict[str, Any]:
    """The flags of all settings that have a value; the inverse of :func:`dmc_config_from_args`."""
    return {
        "--dmc-" + name.replace("_", "-"): value
        for name, value in dataclasses.asdict(settings).items()
        if value is not None
    }


def llama_flags(config: ModelConfig) -> dict[str, str | None]:
    """Megatron's flags for the shape of a model. Raises ``ValueError`` where Megatron has no flag for it."""
    flags: dict[str, str | None] = {
        "--num-layers": str(config.num_layers),
        "--hidden-size": str(config.hidden_size),
        "--ffn-hidden-size": str(config.ffn_hidden_size),
        "--num-attention-heads": str(config.num_attention_heads),
        "--kv-channels": str(config.head_dim),
        "--group-query-attention": None,
        "--num-query-groups": str(config.num_kv_heads),
        "--max-position-embeddings": str(config.max_position_embeddings),
        "--norm-epsilon": str(config.rms_norm_eps),
        "--rotary-base": _whole(config.rope_theta),
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": str(config.vocab_size),
    }
    if not config.tie_word_embeddings:
        flags["--untie-embeddings-and-output-weights"] = None
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        flags["--rotary-seq-len-interpolation-factor"] = _whole(scaling.factor)
    elif scaling is not None:
        fixed = (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
        if fixed != (1.0, 4.0, 8192):
            raise ValueError(f"rope_scaling {scaling}: Megatron knows Llama 3 scaling only with 1, 4 and 8192")
        flags |= {"--use-rope-scaling": None, "--rope-scaling-factor": str(scaling.factor)}
    return flags


def check_shape(argv: list[str], shape: dict[str, str | None]) -> None:
    """Raise ``ValueError`` when ``argv`` gives a flag of ``shape`` another value than the base checkpoint has."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, value in shape.items():
        if value is not None and flag != "--tokenizer-type":
            given.add_argument(flag, dest=flag)
    for flag, value in vars(given.parse_known_args(argv)[0]).items():
        if value is not None and float(value) != float(shape[flag] or 0):
            raise ValueError(f"{flag} {value}: the base checkpoint has {shape[flag]}; leave the flag out")


def _whole(value: float) -> str:
    if value != int(value):
        raise ValueError(f"{value}: Megatron takes this rotary setting only as a whole number")
    return str(int(value))


def with_defaults(argv: list[str], *defaults: Mapping[str, str | None]) -> list[str]:
    """``argv`` with the flags of ``defaults`` that it does not name itself in front; a later table wins."""
    merged: dict[str, str | None] = {}
    for table in defaults:
        merged |= table
    given = {argument.split("=", 1)[0] for argument in argv if argument.startswith("--")}
    return flag_list({flag: value for flag, value in merged.items() if flag not in given}) + argv


def flag_list(flags: Mapping[str, Any]) -> list[str]:
    """Flags and their values as a command line has them; None marks a switch."""
    return [str(part) for flag, value in flags.items() for part in ((flag,) if value is None else (flag, value))]

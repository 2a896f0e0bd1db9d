"""Command-line flags of DMC, generated from :class:`DMCConfig`, and Megatron's defaults for a retrofit."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_dmc.config import SCHEMA_VERSION, DMCConfig
from megatron_dmc.stages import Stage
from megatron_dmc.training.model_flags import add_model_arguments

RUN_DEFAULTS: dict[str, str | None] = {
    "--dataloader-type": "single",
    "--no-create-attention-mask-in-dataloader": None,
    "--adam-beta1": "0.9",
    "--adam-beta2": "0.95",
    "--weight-decay": "0.1",
    "--clip-grad": "1.0",
    "--eval-interval": "1000",
    "--log-interval": "10",
}
"""Megatron flags of every run whose own defaults would sabotage a retrofit; None marks a switch."""

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
    "--freeze-all-layers": "--dmc-train says what learns: all weights, or adapters that decide; there is no LoRA",
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
    for flag, remedy in (REFUSED_FLAGS if stage.retrofits else REFUSED_FLAGS_PLAIN).items():
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
    group.add_argument(
        "--dmc-log-decisions",
        action="store_true",
        help="log per step what share of tokens each KV head merges, below --save; `report` draws it",
    )
    group.add_argument(
        "--dmc-teacher",
        help="checkpoint of stage off to learn from with --dmc-distill and --dmc-train all; default: the one that the "
        "retrofit began with",
    )
    add_model_arguments(group)
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

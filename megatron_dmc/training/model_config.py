"""Megatron's model configuration from its arguments, with DMC's settings."""

from __future__ import annotations

from typing import Any

from megatron.training.argument_utils import core_transformer_config_from_args, gpt_config_from_args

from megatron_dmc.models.megatron import scaling_from_arguments
from megatron_dmc.training.arguments import dmc_config_from_args
from megatron_dmc.training.model.config import DMCModelConfig, DMCTransformerConfig
from megatron_dmc.training.start import Start


def dmc_model_config(args: Any, *, start: Start) -> DMCModelConfig:
    """The configuration that names our builder.

    Args:
        args: Megatron's parsed arguments with ``--dmc-*``.
        start: where the run starts; sets the position in the training data as well.

    Raises:
        ValueError: a setting outside its range.
    """
    transformer = core_transformer_config_from_args(args, DMCTransformerConfig)
    transformer.dmc = dmc_config_from_args(args)
    transformer.dmc_clear_borrowed_rows = start.clears_rows
    transformer.dmc_creates_adapters = start.creates_adapters
    transformer.dmc_teacher_weights = None if start.teacher is None else str(start.teacher.location.directory)
    transformer.dmc_vocab_size = args.vocab_size
    transformer.rope_theta = float(args.rotary_base)
    transformer.rope_stretch = scaling_from_arguments(vars(args))
    if not start.resumes:
        args.consumed_train_samples = args.dmc_first_sample
    model_config = gpt_config_from_args(args, config=transformer, model_config_cls=DMCModelConfig)
    model_config.rope_scaling_factor = args.rope_scaling_factor
    return model_config

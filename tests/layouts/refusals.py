"""What a rank answers to flags that compressing attention cannot serve."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from megatron_dmc.training import pretrain
from megatron_dmc.training.model.builder import DMCModelBuilder
from megatron_dmc.training.start import Start


def refusals(commands: list[tuple[list[str], dict[str, Any]]], world_size: int = 1) -> list[str | None]:
    """Build the model of each command as far as its checks; the text of the ``ValueError``, or None.

    Args:
        commands: flags, and settings of the model configuration that have no flag.
        world_size: ranks that the command claims to run on.
    """
    os.environ["WORLD_SIZE"] = str(world_size)
    pretrain.find_start = lambda *_: Start(config=None, resumes=False)
    return [_refusal(*command) for command in commands]


def _refusal(argv: list[str], settings: dict[str, Any]) -> str | None:
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    try:
        _, model_config = pretrain.configure(pretrain.prepare(argv))
        for name, value in settings.items():
            setattr(model_config, name, value)
        DMCModelBuilder(model_config).build_model(pg_collection=None)
    except ValueError as error:
        return str(error)
    except AssertionError as error:
        # All checks passed: building began, and misses its process groups.
        return None if "not initialized" in str(error) else f"not refused by name: {error}"
    finally:
        destroy_global_vars()
        destroy_num_microbatches_calculator()


def missing_settings(names: list[str]) -> list[str]:
    """Those of ``names`` that are no setting of this Megatron's model configuration."""
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

    known = {field.name for kind in (TransformerConfig, GPTModelConfig) for field in dataclasses.fields(kind)}
    return [name for name in names if name not in known]

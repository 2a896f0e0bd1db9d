"""Builds the model of a stage, and its teacher: ours where attention compresses, Megatron's own in stage ``off``."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model
from megatron.training.models.gpt import GPTModelBuilder

from megatron_dmc.config import DECISIONS, NONE
from megatron_dmc.training.model.adapter import train_adapters_alone
from megatron_dmc.training.model.gpt_model import DMCGPTModel
from megatron_dmc.training.model.layer_spec import dmc_block_spec
from megatron_dmc.training.model.requirements import check_model_config
from megatron_dmc.training.model.teacher import build_teacher, load_teachers


class DMCModelBuilder(GPTModelBuilder):
    """Megatron's builder with our spec and model class in stages ``zero_out``, ``retrofit`` and ``consolidate``."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """Build one pipeline stage.

        Raises:
            ValueError: a setting that compressing attention cannot serve, named with what to change.
        """
        model_config = self._model_config
        transformer = model_config.transformer
        if not transformer.dmc.retrofits:
            return super().build_model(*args, **kwargs)
        check_model_config(model_config)
        transformer.experimental_attention_variant_loss_scale_func = transformer.dmc_gradient_scale.set
        settings = transformer.dmc
        if transformer.pipeline_model_parallel_size > 1 and (settings.compresses or settings.distill != NONE):
            # The row of statistics and the teacher's rows make the tensors between stages longer than Megatron expects.
            # Its constructor rejects this flag for dense models, so it is set afterwards.
            transformer.variable_seq_lengths = True
        model_config.transformer_layer_spec = dmc_block_spec
        model = super().build_model(*args, **kwargs)
        # Megatron's builder names its model class; ours only overrides methods, so the class can be exchanged.
        model.__class__ = DMCGPTModel
        if settings.train == DECISIONS:
            train_adapters_alone(model)
        if transformer.dmc_teacher_weights is not None:
            model.frozen_teacher = (build_teacher(model_config, *args, **kwargs),)
        return model

    def build_distributed_models(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Build all chunks of this rank and wrap them for training; the frozen teacher gets its weights."""
        chunks = super().build_distributed_models(*args, **kwargs)
        weights = self._model_config.transformer.dmc_teacher_weights
        if weights is not None:
            teachers = [teacher for chunk in chunks for teacher in unwrap_model(chunk).frozen_teacher]
            load_teachers(teachers, weights)
        return chunks

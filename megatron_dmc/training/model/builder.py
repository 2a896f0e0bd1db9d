"""Builds the model of a stage: ours where attention compresses, Megatron's own where the stage is ``off``."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.training.models.gpt import GPTModelBuilder

from megatron_dmc.training.model.gpt_model import DMCGPTModel
from megatron_dmc.training.model.layer_spec import dmc_block_spec
from megatron_dmc.training.model.requirements import check_model_config


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
        if transformer.dmc.compresses and transformer.pipeline_model_parallel_size > 1:
            # The row of statistics makes the tensors between stages longer than Megatron expects. Its constructor
            # rejects this flag for dense models, so it is set afterwards.
            transformer.variable_seq_lengths = True
        model_config.transformer_layer_spec = dmc_block_spec
        model = super().build_model(*args, **kwargs)
        # Megatron's builder names its model class; ours only overrides methods, so the class can be exchanged.
        model.__class__ = DMCGPTModel
        return model

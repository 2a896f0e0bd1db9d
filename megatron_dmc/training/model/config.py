"""Megatron's model configuration with the settings of DMC beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.rope_scaling import RopeScaling
from megatron_dmc.training.model.microbatch import GradientScale, Observer


@dataclass
class DMCTransformerConfig(TransformerConfig):
    """Megatron's transformer configuration; attention layers find DMC's settings and the rotary base here.

    ``dmc_clear_borrowed_rows``: this run starts ``retrofit`` from a ``zero_out`` checkpoint.
    ``dmc_creates_adapters``: this run starts from a checkpoint that has none.
    ``dmc_vocab_size``: tokens of the vocabulary without the rows that pad it; None where they are not known apart.
    ``dmc_teacher_weights``: directory of the iteration that a frozen teacher is loaded from; None where there is none.
    """

    dmc: DMCConfig = field(default_factory=DMCConfig)
    rope_theta: float = 10000.0
    rope_stretch: RopeScaling | None = None
    dmc_clear_borrowed_rows: bool = False
    dmc_creates_adapters: bool = False
    dmc_vocab_size: int | None = None
    dmc_teacher_weights: str | None = None
    dmc_gradient_scale: GradientScale = field(default_factory=GradientScale)
    dmc_observer: Observer | None = None


@dataclass(kw_only=True)
class DMCModelConfig(GPTModelConfig):
    """Names our builder; everything else is Megatron's."""

    builder: ClassVar[str] = "megatron_dmc.training.model.builder.DMCModelBuilder"

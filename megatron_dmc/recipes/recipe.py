"""What the quickstart runs: the shape of the small model, the lengths of the stages, and how each is trained."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.runs.layout import BASE
from megatron_dmc.stages import CONSOLIDATE, OFF, RETROFIT, ZERO_OUT, Stage, find_stage
from megatron_dmc.training.arguments import dmc_flags, flag_list

SMALL_LLAMA = ModelConfig(
    hidden_size=128,
    num_layers=4,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=32,
    ffn_hidden_size=384,
    vocab_size=512,
    max_position_embeddings=1024,
    dtype="float32",
)
"""0.9 million parameters: trained from scratch in minutes on two CPU cores."""


@dataclass(frozen=True)
class Training:
    """One stage: its length, and its learning rate from ``learning_rate`` to ``min_learning_rate``.

    ``batch_size``: sequences per step.
    """

    steps: int
    learning_rate: float
    min_learning_rate: float
    decay: str = "constant"
    warmup_steps: int = 0
    batch_size: int = 2

    def of_length(self, steps: int) -> Training:
        """The same training over another number of steps."""
        return dataclasses.replace(self, steps=steps, warmup_steps=min(self.warmup_steps, steps // 2))


def published(stage: Stage, steps: int, batch_size: int) -> Training:
    """A stage of DMC with its published learning rate."""
    rate = DMCConfig(stage=stage.name).published.learning_rate
    assert rate is not None
    return Training(steps, rate.first, rate.last, rate.decay, batch_size=batch_size)


def _small_stages() -> dict[str, Training]:
    return {
        BASE: Training(640, 3e-3, 3e-4, "cosine", 50, batch_size=12),
        ZERO_OUT.name: Training(60, 1e-3, 1e-3),
        RETROFIT.name: Training(1600, 1e-3, 1e-3),
        CONSOLIDATE.name: Training(1300, 1e-3, 1e-4, "cosine"),
    }


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; equal recipes give equal runs. Defaults: the small model.

    Attributes:
        stages: by name, in their order; ``base`` trains the model itself, and has no steps where the user brings one.
        dmc: settings of compression; each stage puts in its own name.
        retrofit_temperature: of the decisions while the target rises; None = as in ``dmc``. Softer decisions let the
            gradient of more tokens say which heads can merge; the stage after it then hardens them.
        seq_length: tokens of a sequence.
        micro_batch_size: sequences at once; None = a whole batch.
        eval_sequences: sequences to measure on.
        seed: of Megatron.
    """

    stages: Mapping[str, Training] = field(default_factory=_small_stages)
    dmc: DMCConfig = field(default_factory=lambda: DMCConfig(loss_weight=0.7))
    retrofit_temperature: float | None = 0.6
    seq_length: int = 256
    micro_batch_size: int | None = None
    eval_sequences: int = 512
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in self.retrofit_stages:
            if self.stage(name).steps < 1:
                raise ValueError(f"{name} of {self.stage(name).steps} steps: must be at least 1")
        for name in ("seq_length", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in self.stages:
            batch, at_once = self.stage(name).batch_size, self.micro_batch(name)
            if batch < 1 or at_once < 1 or batch % at_once:
                raise ValueError(f"micro_batch_size={at_once}: must divide the global batch of {batch} in {name}")

    @property
    def retrofit_stages(self) -> tuple[str, ...]:
        """Names of the stages that have a control, in their order."""
        return tuple(name for name in self.stages if name != BASE)

    def micro_batch(self, name: str) -> int:
        """Sequences of a stage that are computed at once."""
        return self.stage(name).batch_size if self.micro_batch_size is None else self.micro_batch_size

    def with_batch_size(self, batch_size: int) -> Recipe:
        """The same recipe with ``batch_size`` sequences per step in every stage."""
        return self.with_stages(
            {name: dataclasses.replace(stage, batch_size=batch_size) for name, stage in self.stages.items()}
        )

    def with_stages(self, changes: Mapping[str, Training]) -> Recipe:
        """The same recipe with some stages trained in another way."""
        return dataclasses.replace(self, stages={**self.stages, **changes})

    def stage(self, name: str) -> Training:
        """The training of a stage."""
        return self.stages[name]

    def first_sample(self, name: str) -> int:
        """Position of a stage's first sequence in the one order of all data."""
        return self._samples(itertools.takewhile(lambda stage: stage != name, self.stages))

    @property
    def total_samples(self) -> int:
        """Sequences that all stages read; control and retrofit read the same ones."""
        return self._samples(self.stages)

    def _samples(self, stages: Iterable[str]) -> int:
        return sum(self.stage(name).steps * self.stage(name).batch_size for name in stages)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        settings = dataclasses.asdict(self)
        return {**settings.pop("stages"), **settings}


SMALL = Recipe()


def user_model_recipe() -> Recipe:
    """For a pretrained Llama: the published learning rates ([DMC] section 4), and no base training."""
    return Recipe(
        stages={
            BASE: Training(0, 0.0, 0.0),
            **{
                stage.name: published(stage, steps, batch_size=16)
                for stage, steps in ((ZERO_OUT, 50), (RETROFIT, 300), (CONSOLIDATE, 150))
            },
        },
        dmc=DMCConfig(),
        retrofit_temperature=None,
        micro_batch_size=1,
    )


def flags(recipe: Recipe, name: str, *, control: bool = False) -> list[str]:
    """Megatron's flags and ours for one stage, without the paths.

    Args:
        recipe: of the run.
        name: of the stage.
        control: train the stage without compression, everything else equal.
    """
    training = recipe.stage(name)
    settings: dict[str, Any] = {
        "--seq-length": recipe.seq_length,
        "--micro-batch-size": recipe.micro_batch(name),
        "--global-batch-size": training.batch_size,
        "--train-iters": training.steps,
        "--lr": training.learning_rate,
        "--min-lr": training.min_learning_rate,
        "--lr-decay-style": training.decay,
        "--lr-warmup-iters": training.warmup_steps,
        "--save-interval": max(1, training.steps // 3),
        "--eval-interval": training.steps,
        "--eval-iters": 0,
        "--seed": recipe.seed,
        "--dmc-total-samples": recipe.total_samples,
        "--dmc-first-sample": recipe.first_sample(name),
    }
    return flag_list(settings | dmc_flags(_dmc(recipe, name, plain=control or name == BASE)))


def _dmc(recipe: Recipe, name: str, *, plain: bool) -> DMCConfig:
    settings = dataclasses.replace(recipe.dmc, stage=OFF.name if plain else name)
    if recipe.retrofit_temperature is None or name == BASE or not find_stage(name).raises_target:
        return settings
    return dataclasses.replace(settings, temperature=recipe.retrofit_temperature)


def data_flags(data: Path, cache: Path) -> dict[str, Any]:
    """Megatron's flags for a directory made by ``data prepare`` and for its index cache."""
    return {
        "--train-data-path": data / "train",
        "--valid-data-path": data / "validation",
        "--test-data-path": data / "test",
        "--data-cache-path": cache,
    }

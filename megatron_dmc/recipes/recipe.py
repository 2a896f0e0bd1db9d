"""What the quickstart runs: the shape of the small model, the lengths of the stages, and how each is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.training.model_flags import model_flags

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

STAGES = ("base", "zero_out", "retrofit", "consolidate")


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


@dataclass(frozen=True)
class Recipe:
    """All settings of a run; equal recipes give equal runs. Defaults: the small model.

    ``base`` has no steps where the user brings a model. ``micro_batch_size``: sequences at once; None = a whole batch.
    ``retrofit_temperature``: of the decisions while the target rises; None = as in ``dmc``. Softer decisions let the
    gradient of more tokens say which heads can merge; ``consolidate`` then hardens them.
    """

    base: Training = Training(640, 3e-3, 3e-4, "cosine", 50, batch_size=12)
    zero_out: Training = Training(60, 1e-3, 1e-3)
    retrofit: Training = Training(1600, 1e-3, 1e-3)
    consolidate: Training = Training(1300, 1e-3, 1e-4, "cosine")
    dmc: DMCConfig = field(default_factory=lambda: DMCConfig(loss_weight=0.7))
    retrofit_temperature: float | None = 0.6
    seq_length: int = 256
    micro_batch_size: int | None = None
    eval_sequences: int = 512
    seed: int = 1234

    def __post_init__(self) -> None:
        for name in ("zero_out", "retrofit", "consolidate"):
            if self.stage(name).steps < 1:
                raise ValueError(f"{name} of {self.stage(name).steps} steps: must be at least 1")
        for name in ("seq_length", "eval_sequences"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in STAGES:
            batch, at_once = self.stage(name).batch_size, self.micro_batch(name)
            if batch < 1 or at_once < 1 or batch % at_once:
                raise ValueError(f"micro_batch_size={at_once}: must divide the global batch of {batch} in {name}")

    def micro_batch(self, name: str) -> int:
        """Sequences of a stage that are computed at once."""
        return self.stage(name).batch_size if self.micro_batch_size is None else self.micro_batch_size

    def with_batch_size(self, batch_size: int) -> Recipe:
        """The same recipe with ``batch_size`` sequences per step in every stage."""
        stages: dict[str, Any] = {name: dataclasses.replace(self.stage(name), batch_size=batch_size) for name in STAGES}
        return dataclasses.replace(self, **stages)

    def stage(self, name: str) -> Training:
        """The training of ``base``, ``zero_out``, ``retrofit`` or ``consolidate``."""
        training: Training = getattr(self, name)
        return training

    def first_sample(self, name: str) -> int:
        """Position of a stage's first sequence in the one order of all data."""
        return self._samples(STAGES[: STAGES.index(name)])

    @property
    def total_samples(self) -> int:
        """Sequences that all stages read; control and retrofit read the same ones."""
        return self._samples(STAGES)

    def _samples(self, stages: Sequence[str]) -> int:
        return sum(self.stage(name).steps * self.stage(name).batch_size for name in stages)

    def to_dict(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        return dataclasses.asdict(self)


SMALL = Recipe()


def user_model_recipe() -> Recipe:
    """For a pretrained Llama: the published learning rates ([DMC] section 4), and no base training."""
    return Recipe(
        base=Training(0, 0.0, 0.0),
        zero_out=Training(50, 3e-5, 3e-5, batch_size=16),
        retrofit=Training(300, 3e-5, 3e-5, batch_size=16),
        consolidate=Training(150, 3e-5, 3e-6, "cosine", batch_size=16),
        dmc=DMCConfig(),
        retrofit_temperature=None,
        micro_batch_size=1,
    )


def flags(recipe: Recipe, name: str, *, control: bool = False) -> list[str]:
    """Megatron's flags and ours for one stage, without the paths.

    Args:
        recipe: of the run.
        name: ``base``, ``zero_out``, ``retrofit`` or ``consolidate``.
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
    for key, value in _dmc(recipe, name, plain=control or name == "base").to_dict().items():
        if key != "schema_version" and value is not None:
            settings["--dmc-" + key.replace("_", "-")] = value
    return [str(part) for pair in settings.items() for part in pair]


def _dmc(recipe: Recipe, name: str, *, plain: bool) -> DMCConfig:
    settings = dataclasses.replace(recipe.dmc, stage="off" if plain else name)
    if name != "retrofit" or recipe.retrofit_temperature is None:
        return settings
    return dataclasses.replace(settings, temperature=recipe.retrofit_temperature)


def shape_flags(config: ModelConfig) -> list[str]:
    """Megatron's flags for a model that is trained from scratch."""
    return [
        part for flag, value in model_flags(config).items() for part in ([flag] if value is None else [flag, value])
    ]

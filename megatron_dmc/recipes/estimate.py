"""Memory, disk and time that a retrofit on this machine will need; what cannot fit is refused before it starts."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.models.config import ModelConfig
from megatron_dmc.recipes.recipe import Recipe
from megatron_dmc.support.files import free_space
from megatron_dmc.support.memory import available_memory
from megatron_dmc.support.units import amount, duration

TRAINING_BYTES_PER_PARAMETER = 16
"""float32 parameter, gradient and two moments of Adam."""
CHECKPOINT_BYTES_PER_PARAMETER = 12
"""float32 parameter and two moments of Adam."""
CHECKPOINTS_PER_STAGE = 4
ACTIVATIONS_PER_TOKEN_AND_LAYER = 34
"""Hidden-size vectors that a layer keeps for its backward pass, [Korthikanti et al. 2022] section 4.1."""
LOGIT_COPIES = 4
PROCESS_BYTES = 1.2e9
"""torch, Megatron and their libraries in one process."""
FLOPS_PER_PARAMETER_AND_TOKEN = 6
SHARE_OF_PEAK = 0.35
"""What training reaches of the speed of a large matrix product, about."""


@dataclass(frozen=True)
class Estimate:
    """What a run needs: bytes of memory and disk, seconds of training."""

    memory_bytes: float
    disk_bytes: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{amount(self.memory_bytes, 'B')} of memory, {amount(self.disk_bytes, 'B')} of disk, "
            f"about {duration(self.seconds)} of training"
        )


def estimate(config: ModelConfig, recipe: Recipe, peak_flops: float) -> Estimate:
    """The needs of ``recipe`` on a machine that does ``peak_flops`` operations per second."""
    parameters = config.num_parameters
    tokens = max(map(recipe.micro_batch, recipe.retrofit_stages)) * recipe.seq_length
    kept = 4 * tokens * config.hidden_size * ACTIVATIONS_PER_TOKEN_AND_LAYER * config.num_layers
    logits = 4 * tokens * config.vocab_size * LOGIT_COPIES
    retrofit_samples = recipe.total_samples - recipe.first_sample(recipe.retrofit_stages[0])
    trained_tokens = recipe.seq_length * (recipe.total_samples + retrofit_samples)
    stages = 1 + 2 * len(recipe.retrofit_stages)
    return Estimate(
        memory_bytes=PROCESS_BYTES + TRAINING_BYTES_PER_PARAMETER * parameters + kept + logits,
        disk_bytes=stages * CHECKPOINTS_PER_STAGE * CHECKPOINT_BYTES_PER_PARAMETER * parameters,
        seconds=FLOPS_PER_PARAMETER_AND_TOKEN * parameters * trained_tokens / (SHARE_OF_PEAK * peak_flops),
    )


def measure_peak_flops(seconds: float = 0.5) -> float:
    """Operations per second of the fastest float32 matrix product within some time."""
    import torch

    size = 1024
    left, right = torch.ones(size, size), torch.ones(size, size)
    fastest = math.inf
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def refuse_what_cannot_fit(needed: Estimate, output: Path, max_hours: float) -> None:
    """Compare the needs with this machine.

    Raises:
        ValueError: too little memory or disk, or more than ``max_hours`` of training.
    """
    (_, free_disk), free_memory = free_space(output), available_memory()
    smaller = "take a smaller model, fewer or shorter steps, or train on a cluster (launch/README.md)"
    for needs, has, kind in ((needed.memory_bytes, free_memory, "memory"), (needed.disk_bytes, free_disk, "disk")):
        if needs > has:
            raise ValueError(
                f"the retrofit needs about {amount(needs, 'B')} of {kind}, free are {amount(has, 'B')}: {smaller}"
            )
    if needed.seconds > 3600 * max_hours:
        raise ValueError(
            f"the retrofit would take about {duration(needed.seconds)}, --max-hours allows {max_hours:g}: {smaller}"
        )

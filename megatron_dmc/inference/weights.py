"""Where a model comes from: what inference needs of a checkpoint, whatever its format."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig


class ModelSource(Protocol):
    """A Llama on disk; ``megatron_dmc.checkpoint.source.open_source`` opens every format that we read."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""

    @property
    def dmc(self) -> DMCConfig | None:
        """Settings of DMC; None for a plain Llama."""

    def names(self) -> list[str]:
        """Names of all tensors, as Hugging Face's Llama has them."""

    def tensor(self, name: str) -> Tensor:
        """One tensor in its stored dtype, on the CPU.

        Raises:
            ValueError: the tensor is missing or damaged.
        """

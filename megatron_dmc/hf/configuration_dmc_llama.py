"""Configuration of an exported model: Llama's, and the settings of DMC under ``dmc``."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import LLAMA
from megatron_dmc.models.hugging_face import FIXED_SETTINGS, READ_SETTINGS, parse_hf_config


class DMCLlamaConfig(LlamaConfig):
    """Llama with a compressed cache.

    Args:
        dmc: what :meth:`DMCConfig.to_dict` wrote; None takes the defaults.
        **llama: settings of transformers' Llama.

    Raises:
        ValueError: settings of another schema version, unknown, or out of range.
    """

    model_type = LLAMA.dmc_model_type

    def __init__(self, dmc: dict[str, Any] | None = None, **llama: Any) -> None:
        self.dmc = (DMCConfig() if dmc is None else DMCConfig.from_dict(dmc)).to_dict()
        super().__init__(**llama)

    def settings(self) -> DMCConfig:
        """The settings of DMC."""
        return DMCConfig.from_dict(self.dmc)

    def shape(self) -> ModelConfig:
        """The shape of the model, as the rest of the package knows it.

        Raises:
            ValueError: a setting that changes what Llama computes and is not supported.
        """
        given = self.to_dict()
        names = READ_SETTINGS | FIXED_SETTINGS.keys()
        config, _ = parse_hf_config({name: given[name] for name in names if name in given})
        return config

"""Configurations of exported models: those of their family, and the settings of DMC under ``dmc``."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import LLAMA, QWEN2, QWEN3
from megatron_dmc.models.hugging_face import parse_hf_config
from megatron_dmc.models.hugging_face_settings import FIXED_SETTINGS, READ_SETTINGS


class CompressedConfig:
    """What every family's configuration knows besides: it stands before that of transformers.

    ``dmc`` is what :meth:`DMCConfig.to_dict` wrote; None takes the defaults. The classes raise ``ValueError`` for
    settings of another schema version, unknown, or out of range.
    """

    dmc: dict[str, Any]

    def settings(self) -> DMCConfig:
        """The settings of DMC."""
        return DMCConfig.from_dict(self.dmc)

    def shape(self) -> ModelConfig:
        """The shape of the model, as the rest of the package knows it.

        Raises:
            ValueError: a setting that changes what the family computes and is not supported.
        """
        given = self.to_dict()
        names = READ_SETTINGS | FIXED_SETTINGS.keys()
        config, _ = parse_hf_config({name: given[name] for name in names if name in given})
        return config


def _checked(dmc: dict[str, Any] | None) -> dict[str, Any]:
    return (DMCConfig() if dmc is None else DMCConfig.from_dict(dmc)).to_dict()


class DMCLlamaConfig(CompressedConfig, LlamaConfig):
    """Llama with a compressed cache; ``llama`` are the settings of transformers' Llama."""

    model_type = LLAMA.dmc_model_type

    def __init__(self, dmc: dict[str, Any] | None = None, **llama: Any) -> None:
        self.dmc = _checked(dmc)
        super().__init__(**llama)


class DMCQwen2Config(CompressedConfig, Qwen2Config):
    """Qwen 2 with a compressed cache; ``qwen2`` are the settings of transformers' Qwen 2."""

    model_type = QWEN2.dmc_model_type

    def __init__(self, dmc: dict[str, Any] | None = None, **qwen2: Any) -> None:
        self.dmc = _checked(dmc)
        super().__init__(**qwen2)


class DMCQwen3Config(CompressedConfig, Qwen3Config):
    """Qwen 3 with a compressed cache; ``qwen3`` are the settings of transformers' Qwen 3."""

    model_type = QWEN3.dmc_model_type

    def __init__(self, dmc: dict[str, Any] | None = None, **qwen3: Any) -> None:
        self.dmc = _checked(dmc)
        super().__init__(**qwen3)

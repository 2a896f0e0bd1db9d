"""Small checkpoints for the tests: random weights, written by the safetensors library or by transformers itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.tensors import entries
from megatron_dmc.ops.rope_scaling import RopeScaling

TINY = ModelConfig(
    hidden_size=32,
    num_layers=4,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=48,
    vocab_size=257,
    max_position_embeddings=128,
    dtype="float32",
)
"""Grouped queries, heads wider than the hidden size, a vocabulary that needs padding."""

VARIANTS = {
    "mha": dataclasses.replace(TINY, num_kv_heads=4, head_dim=8, vocab_size=256),
    "gqa": TINY,
    "tied": dataclasses.replace(TINY, tie_word_embeddings=True),
    "bf16": dataclasses.replace(TINY, dtype="bfloat16"),
    "llama3": dataclasses.replace(
        TINY, rope_theta=500000.0, rope_scaling=RopeScaling("llama3", 8.0), max_position_embeddings=16384
    ),
    "qwen2": dataclasses.replace(TINY, family="qwen2", qkv_bias=True, rope_theta=1e6, rms_norm_eps=1e-6),
    "qwen3": dataclasses.replace(TINY, family="qwen3", qk_norm=True, rope_theta=1e6, tie_word_embeddings=True),
    "linear": dataclasses.replace(TINY, rope_scaling=RopeScaling("linear", 2.0), rms_norm_eps=1e-6),
}


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a model under Hugging Face names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for entry in entries(config):
        for name, shape in zip(entry.hf_names, entry.hf_shapes(config), strict=True):
            is_norm = len(shape) == 1 and not name.endswith(".bias")
            weight = torch.randn(shape, generator=generator) * (0.1 if is_norm else 0.3)
            tensors[name] = (weight + is_norm).to(getattr(torch, config.dtype))
    return tensors


def write_model(
    directory: Path, config: ModelConfig = TINY, dmc: DMCConfig | None = None, *, seed: int = 0, **more: Any
) -> Path:
    """A Hugging Face directory with random weights; ``more`` adds to its ``config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(random_tensors(config, seed), directory / "model.safetensors", metadata={"format": "pt"})
    settings = to_hf_config(config, dmc, bos_token_id=1, eos_token_id=2) | more
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


def write_with_transformers(directory: Path, config: ModelConfig, seed: int = 0) -> Path:
    """The same shape, made and saved by transformers."""
    import transformers

    torch.manual_seed(seed)
    settings = {
        name: value for name, value in to_hf_config(config).items() if name not in ("architectures", "torch_dtype")
    }
    theirs = transformers.AutoConfig.for_model(**settings, initializer_range=0.3)
    model = transformers.AutoModelForCausalLM.from_config(theirs).to(getattr(torch, config.dtype))
    for weight in model.parameters():
        if weight.ndim == 1:
            # Norms begin with ones and biases with zeros there, which would hide what becomes of them.
            weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(directory, max_shard_size="40KB")
    return directory


def transformers_logits(directory: Path, tokens: list[list[int]]) -> torch.Tensor:
    """Logits in float32 of transformers' whole model; it must find every tensor and no other."""
    import transformers

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits

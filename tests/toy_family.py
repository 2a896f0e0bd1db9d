"""A model family that lives in the tests alone: Llama's block with other names and normalised queries and keys.

Importing it registers it. Legend: S sequence, h hidden size, H heads, D head dim.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_convert import forward
from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import FAMILIES, Family
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests import short_run
from tests.checkpoints_convert.models import random_tensors

TOY = Family(
    model_type="toy",
    name="toy",
    architecture="ToyForCausalLM",
    tensor_names={
        "embedding": "transformer.wte",
        "attention_norm": "transformer.h.*.ln_1.scale",
        "q": "transformer.h.*.attn.wq",
        "k": "transformer.h.*.attn.wk",
        "v": "transformer.h.*.attn.wv",
        "q_norm": "transformer.h.*.attn.q_scale",
        "k_norm": "transformer.h.*.attn.k_scale",
        "attention_output": "transformer.h.*.attn.wo",
        "mlp_norm": "transformer.h.*.ln_2.scale",
        "gate": "transformer.h.*.mlp.w1",
        "up": "transformer.h.*.mlp.w3",
        "down": "transformer.h.*.mlp.w2",
        "final_norm": "transformer.ln_f.scale",
        "output": "head",
    },
    qk_norm=True,
    stated=("toy_width",),
    fixed={"toy_width": (1,)},
)
FAMILIES[TOY.model_type] = TOY

# Llama 3's scaling with numbers that Megatron's own layers do not know.
CONFIG = ModelConfig(
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=48,
    vocab_size=97,
    max_position_embeddings=64,
    rope_scaling=RopeScaling("llama3", 8.0, 2.0, 5.0, original_max_position_embeddings=16),
    dtype="float32",
    family="toy",
    qk_norm=True,
)


def write_toy(directory: Path, dmc: DMCConfig | None = None) -> Path:
    """A random model on disk."""
    directory.mkdir()
    save_file(random_tensors(CONFIG), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_hf_config(CONFIG, dmc)))
    return directory


def reference_logits(weights: dict[str, Tensor], token_S: Tensor) -> Tensor:
    """Logits [S, V] in plain PyTorch, from the names above."""
    hidden_Sh = weights["transformer.wte"][token_S]
    for layer in range(CONFIG.num_layers):
        own = {name.split(f".h.{layer}.")[-1]: weight for name, weight in weights.items()}
        normed_Sh = F.rms_norm(hidden_Sh, hidden_Sh.shape[-1:], own["ln_1.scale"], CONFIG.rms_norm_eps)
        hidden_Sh = hidden_Sh + _attention(normed_Sh, own) @ own["attn.wo"].T
        normed_Sh = F.rms_norm(hidden_Sh, hidden_Sh.shape[-1:], own["ln_2.scale"], CONFIG.rms_norm_eps)
        hidden_Sh = hidden_Sh + (F.silu(normed_Sh @ own["mlp.w1"].T) * (normed_Sh @ own["mlp.w3"].T)) @ own["mlp.w2"].T
    normed_Sh = F.rms_norm(hidden_Sh, hidden_Sh.shape[-1:], weights["transformer.ln_f.scale"], CONFIG.rms_norm_eps)
    return normed_Sh @ weights["head"].T


def _attention(normed_Sh: Tensor, own: dict[str, Tensor]) -> Tensor:
    q_HSD, k_HSD, v_HSD = (
        (normed_Sh @ own[f"attn.w{which}"].T).unflatten(-1, (-1, CONFIG.head_dim)).transpose(0, 1) for which in "qkv"
    )
    q_HSD, k_HSD = (
        _turned(F.rms_norm(heads, heads.shape[-1:], own[f"attn.{which}_scale"], CONFIG.rms_norm_eps))
        for which, heads in (("q", q_HSD), ("k", k_HSD))
    )
    output_HSD = F.scaled_dot_product_attention(q_HSD, k_HSD, v_HSD, is_causal=True, enable_gqa=True)
    return output_HSD.transpose(0, 1).flatten(1)


def _turned(x_HSD: Tensor) -> Tensor:
    half = CONFIG.head_dim // 2
    angle_SC = torch.arange(x_HSD.shape[1])[:, None] * torch.tensor([_frequency(channel) for channel in range(half)])
    turned = torch.complex(x_HSD[..., :half], x_HSD[..., half:]) * torch.polar(torch.ones_like(angle_SC), angle_SC)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _frequency(channel: int) -> float:
    scaling = CONFIG.rope_scaling
    frequency = CONFIG.rope_theta ** (-2 * channel / CONFIG.head_dim)
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns >= scaling.high_freq_factor:
        return frequency
    if turns <= scaling.low_freq_factor:
        return frequency / scaling.factor
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return kept * frequency + (1 - kept) * frequency / scaling.factor


def train(argv: list[str]) -> Any:
    """As ``short_run.train``, on a rank that has imported this module."""
    return short_run.train(argv)


if __name__ == "__main__":
    forward.main(Path(sys.argv[1]))

"""Small random models for tests, whose heads decide, and decide differently."""

import dataclasses

import torch

from megatron_dmc.config import DMS, DMCConfig, has_adapter
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.models.config import ModelConfig


class RandomSource:
    """A model in memory, as ``open_source`` would give it.

    Decision logits have mean -``settings.decision_bias`` and a spread of 4: a bias of 0 accumulates (or evicts) half of
    the tokens, -4 most of them.
    """

    def __init__(self, config: ModelConfig, settings: DMCConfig | None = None, seed: int = 0):
        self.config, self.dmc = dataclasses.replace(config, adapter=has_adapter(settings)), settings
        generator = torch.Generator().manual_seed(seed)

        def random(*shape, scale):
            return (torch.randn(*shape, generator=generator) * scale).to(getattr(torch, config.dtype))

        hidden, ffn = config.hidden_size, config.ffn_hidden_size
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.tensors = {"model.embed_tokens.weight": random(config.vocab_size, hidden, scale=1.0)}
        for index in range(config.num_layers):
            prefix = f"model.layers.{index}"
            layer = {
                "input_layernorm": 1 + random(hidden, scale=0.1),
                "self_attn.q_proj": random(q_size, hidden, scale=1.5 / hidden**0.5),
                "self_attn.k_proj": random(kv_size, hidden, scale=1.5 / hidden**0.5),
                "self_attn.v_proj": random(kv_size, hidden, scale=1 / hidden**0.5),
                "self_attn.o_proj": random(hidden, q_size, scale=1 / q_size**0.5),
                "post_attention_layernorm": 1 + random(hidden, scale=0.1),
                "mlp.gate_proj": random(ffn, hidden, scale=1 / hidden**0.5),
                "mlp.up_proj": random(ffn, hidden, scale=1 / hidden**0.5),
                "mlp.down_proj": random(hidden, ffn, scale=1 / ffn**0.5),
            }
            layer["self_attn.k_proj"][config.head_dim - 1 :: config.head_dim] *= 4 / 1.5
            if config.qk_norm:
                layer |= {f"self_attn.{which}_norm": 1 + random(config.head_dim, scale=0.1) for which in "qk"}
            if self.config.adapter:
                layer["self_attn.dms_proj_alpha_norm"] = 1 + random(hidden, scale=0.1)
                layer["self_attn.dms_proj_alpha"] = random(config.num_kv_heads, hidden, scale=0.04 / hidden**0.5)
            elif settings is not None and settings.method == DMS:
                group_size = config.queries_per_kv_head * config.head_dim
                layer["self_attn.q_proj"][config.head_dim - 1 :: group_size] *= 4 / 1.5
            self.tensors |= {f"{prefix}.{name}.weight": tensor for name, tensor in layer.items()}
            if config.qkv_bias:
                sizes = {"q": q_size, "k": kv_size, "v": kv_size}
                biases = {f"{prefix}.self_attn.{which}_proj.bias": random(sizes[which], scale=0.5) for which in "qkv"}
                self.tensors |= biases
        self.tensors["model.norm.weight"] = 1 + random(hidden, scale=0.1)
        if not config.tie_word_embeddings:
            self.tensors["lm_head.weight"] = random(config.vocab_size, hidden, scale=2 / hidden**0.5)

    def names(self):
        return list(self.tensors)

    def tensor(self, name, cut=None):
        return self.tensors[name] if cut is None else cut.of(self.tensors[name])


QWEN2 = {"family": "qwen2", "qkv_bias": True}
QWEN3 = {"family": "qwen3", "qk_norm": True}
"""Changes that make a tiny Llama one of these."""


def tiny_llama(num_attention_heads=4, num_kv_heads=2, **changes) -> ModelConfig:
    """2 layers, 50 tokens, float32."""
    shape = {
        "hidden_size": 32,
        "num_layers": 2,
        "head_dim": 16,
        "ffn_hidden_size": 48,
        "vocab_size": 50,
        "max_position_embeddings": 128,
        "dtype": "float32",
    }
    return ModelConfig(num_attention_heads=num_attention_heads, num_kv_heads=num_kv_heads, **(shape | changes))


def tiny_model(settings: DMCConfig | None = None, seed: int = 0, **changes) -> Decoder:
    """A random model; ``settings`` None makes it a plain Llama."""
    return Decoder(RandomSource(tiny_llama(**changes), settings, seed))

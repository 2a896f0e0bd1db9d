"""Llama in plain PyTorch, from any checkpoint that we read: one body, and attention given by the caller.

Legend: S sequence, B batch, H hidden size, N query heads, G KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE, CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import (
    Attention,
    AttentionSettings,
    DecisionTrace,
    DecodeAttention,
    FullSequenceAttention,
    PrefillAttention,
)
from megatron_dmc.inference.weights import ModelSource
from megatron_dmc.models.config import DTYPES


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer; matrices are [out, in]."""

    attention_norm: Tensor
    qkv: Tensor
    """Query, key and value projections, one above the other."""
    attention_output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    """Gate and up projections, one above the other."""
    down: Tensor


class Decoder:
    """A Llama that reads tokens and writes its cache; inference alone, no gradients.

    Args:
        source: checkpoint or exported model.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the stored one.
        device: where it computes.

    Raises:
        ValueError: a tensor is missing or has another shape than the configuration says; an unknown dtype.
    """

    def __init__(self, source: ModelSource, *, dtype: str | None = None, device: torch.device | str = "cpu") -> None:
        self.config = source.config
        self.settings = source.dmc
        dtype = dtype or self.config.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        self.attention_settings = AttentionSettings(self.config, self.settings, self.device)
        self._load(source)

    def _load(self, source: ModelSource) -> None:
        config = self.config
        hidden, ffn, vocab = config.hidden_size, config.ffn_hidden_size, config.vocab_size
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_kv_heads * config.head_dim

        def load(name: str, *shape: int) -> Tensor:
            tensor = source.tensor(name)
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: the model's configuration says {shape}")
            return tensor.to(self.device, self.dtype)

        def load_layer(prefix: str) -> LayerWeights:
            attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
            qkv = [load(f"{attention}.{name}_proj.weight", kv_size, hidden) for name in ("k", "v")]
            qkv = [load(f"{attention}.q_proj.weight", q_size, hidden), *qkv]
            return LayerWeights(
                attention_norm=load(f"{prefix}.input_layernorm.weight", hidden),
                qkv=torch.cat(qkv),
                attention_output=load(f"{attention}.o_proj.weight", hidden, q_size),
                mlp_norm=load(f"{prefix}.post_attention_layernorm.weight", hidden),
                gate_up=torch.cat([load(f"{mlp}.{name}_proj.weight", ffn, hidden) for name in ("gate", "up")]),
                down=load(f"{mlp}.down_proj.weight", hidden, ffn),
            )

        self.embedding = load("model.embed_tokens.weight", vocab, hidden)
        self.layers = [load_layer(f"model.layers.{index}") for index in range(config.num_layers)]
        self.final_norm = load("model.norm.weight", hidden)
        self.output = self.embedding if config.tie_word_embeddings else load("lm_head.weight", vocab, hidden)

    def new_cache(
        self, num_sequences: int, *, block_size: int = DEFAULT_BLOCK_SIZE, num_blocks: int | None = None
    ) -> PagedKVCache:
        """An empty cache for this model; see :class:`PagedKVCache`."""
        shape = CacheShape(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            window_size=self.settings.window_size if self.settings and self.settings.compresses else None,
            block_size=block_size,
        )
        return PagedKVCache(shape, num_sequences, num_blocks=num_blocks, device=self.device)

    @torch.no_grad()
    def forward(self, token_SB: Tensor, trace: DecisionTrace | None = None) -> Tensor:
        """Hidden states [S, B, H] of whole sequences, with hard decisions and without a cache."""
        return self._body(token_SB, FullSequenceAttention(self.attention_settings, len(token_SB), trace))

    @torch.no_grad()
    def prefill(
        self,
        token_SB: Tensor,
        length_B: Tensor,
        cache: PagedKVCache,
        rows_B: Tensor,
        trace: DecisionTrace | None = None,
    ) -> Tensor:
        """Read whole prompts in one pass and fill the cache.

        Args:
            token_SB: prompts, padded at their ends with any token.
            length_B: tokens of each prompt, at least 1.
            cache: with empty rows ``rows_B``.
            rows_B: row of each prompt.
            trace: filled with the decisions of each layer.

        Returns:
            Hidden states [S, B, H]; those of the padding mean nothing.
        """
        whole = FullSequenceAttention(self.attention_settings, len(token_SB), trace)
        hidden_SBH = self._body(token_SB, PrefillAttention(whole, cache, rows_B, length_B))
        cache.num_tokens[rows_B] = length_B
        return hidden_SBH

    @torch.no_grad()
    def decode(
        self, token_B: Tensor, cache: PagedKVCache, rows_B: Tensor, trace: DecisionTrace | None = None
    ) -> Tensor:
        """Read the next token of each sequence: hidden states [B, H]."""
        attention = DecodeAttention(self.attention_settings, cache, rows_B, trace)
        hidden_SBH = self._body(token_B.unsqueeze(0), attention)
        cache.num_tokens[rows_B] += 1
        return hidden_SBH[0]

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] from hidden states [..., H]."""
        return F.linear(hidden, self.output).float()

    def _body(self, token_SB: Tensor, attention: Attention) -> Tensor:
        hidden_SBH = F.embedding(token_SB, self.embedding)
        for index, layer in enumerate(self.layers):
            q_SBND, k_SBGD, v_SBGD = self._project(hidden_SBH, layer)
            mixed_SBH = attention(index, q_SBND, k_SBGD, v_SBGD).flatten(2)
            hidden_SBH = hidden_SBH + F.linear(mixed_SBH, layer.attention_output)
            gate, up = F.linear(self._norm(hidden_SBH, layer.mlp_norm), layer.gate_up).chunk(2, dim=-1)
            hidden_SBH = hidden_SBH + F.linear(F.silu(gate) * up, layer.down)
        return self._norm(hidden_SBH, self.final_norm)

    def _project(self, hidden_SBH: Tensor, layer: LayerWeights) -> list[Tensor]:
        config = self.config
        heads = [config.num_attention_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = F.linear(self._norm(hidden_SBH, layer.attention_norm), layer.qkv)
        return list(qkv.unflatten(-1, (sum(heads), config.head_dim)).split(heads, dim=2))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * normed.to(x.dtype)

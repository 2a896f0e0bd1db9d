"""Models of every family in plain PyTorch, from any checkpoint: one body, and attention given by the caller.

Legend: S sequence, B batch, H hidden size, N query heads, G KV heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.checkpoint.source import Source
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE, CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import (
    Attention,
    AttentionSettings,
    DecisionTrace,
    DecodeAttention,
    FullSequenceAttention,
    PrefillAttention,
)
from megatron_dmc.models.config import DTYPES
from megatron_dmc.models.tensors import by_hf_name, hf_name


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
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    """Norms over the channels of each query and key head, in families that have them."""


class Decoder:
    """A model that reads tokens and writes its cache; inference alone, no gradients.

    Args:
        source: checkpoint or exported model.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the stored one.
        device: where it computes.

    Raises:
        ValueError: a tensor is missing or has another shape than the configuration says; an unknown dtype.
    """

    def __init__(self, source: Source, *, dtype: str | None = None, device: torch.device | str = "cpu") -> None:
        self.config = source.config
        self.settings = source.dmc
        dtype = dtype or self.config.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        self.attention_settings = AttentionSettings(self.config, self.settings, self.device)
        self._load(source)

    def _load(self, source: Source) -> None:
        config = self.config

        def load(role: str, layer: int | None = None) -> Tensor:
            name = hf_name(config, role, layer)
            entry, place = by_hf_name(config)[name]
            tensor, shape = source.tensor(name), entry.hf_shapes(config)[place]
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: the model's configuration says {shape}")
            return tensor.to(self.device, self.dtype)

        def load_layer(layer: int) -> LayerWeights:
            return LayerWeights(
                attention_norm=load("attention_norm", layer),
                qkv=torch.cat([load(role, layer) for role in ("q", "k", "v")]),
                attention_output=load("attention_output", layer),
                mlp_norm=load("mlp_norm", layer),
                gate_up=torch.cat([load(role, layer) for role in ("gate", "up")]),
                down=load("down", layer),
                q_norm=load("q_norm", layer) if config.qk_norm else None,
                k_norm=load("k_norm", layer) if config.qk_norm else None,
            )

        self.embedding = load("embedding")
        self.layers = [load_layer(layer) for layer in range(config.num_layers)]
        self.final_norm = load("final_norm")
        self.output = self.embedding if config.tie_word_embeddings else load("output")

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

    def _project(self, hidden_SBH: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        heads = [config.num_attention_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = F.linear(self._norm(hidden_SBH, layer.attention_norm), layer.qkv)
        q_SBND, k_SBGD, v_SBGD = qkv.unflatten(-1, (sum(heads), config.head_dim)).split(heads, dim=2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q_SBND, k_SBGD = self._norm(q_SBND, layer.q_norm), self._norm(k_SBGD, layer.k_norm)
        return q_SBND, k_SBGD, v_SBGD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.config.rms_norm_eps)
        return weight * normed.to(x.dtype)

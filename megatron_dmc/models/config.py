"""The configuration of a model: what conversion, inference and Megatron's arguments agree on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dmc.ops.rope_scaling import RopeScaling

DTYPES = ("float32", "bfloat16", "float16")

# Far above every known model; a hostile file must not make us reserve memory for its numbers.
SIZE_LIMITS = {
    "hidden_size": 1 << 17,
    "num_layers": 1 << 12,
    "num_attention_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_dim": 1 << 12,
    "ffn_hidden_size": 1 << 20,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that determines the computation of a model, and its stored dtype.

    All families share one block (RMSNorm, grouped queries with rotary embeddings, SwiGLU); ``family`` names the table
    in ``families`` that says how its tensors are called, ``qk_norm`` adds an RMSNorm over the channels of every query
    and key head before their rotation, ``qkv_bias`` biases to the projections of queries, keys and values, ``adapter``
    a norm and a projection per layer that decide about the cache (settings ``decision_source`` of DMS).

    Raises ``ValueError`` on sizes out of bounds or heads that do not divide into groups.
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    family: str = "llama"
    qk_norm: bool = False
    qkv_bias: bool = False
    adapter: bool = False

    def __post_init__(self) -> None:
        for name, limit in SIZE_LIMITS.items():
            require(0 < getattr(self, name) <= limit, name, getattr(self, name), f"in 1..{limit}")
        require(
            self.num_attention_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"a divisor of num_attention_heads={self.num_attention_heads}",
        )
        require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "even (rotary embeddings turn pairs of channels)")
        require(
            math.isfinite(self.rms_norm_eps) and self.rms_norm_eps > 0, "rms_norm_eps", self.rms_norm_eps, "positive"
        )
        require(math.isfinite(self.rope_theta) and self.rope_theta > 1, "rope_theta", self.rope_theta, "above 1")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")

    @property
    def queries_per_kv_head(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_kv_heads

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        heads = 2 * self.num_attention_heads + 2 * self.num_kv_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.ffn_hidden_size + 2)
        layer += 2 * self.head_dim * self.qk_norm
        layer += (self.num_attention_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        layer += self.hidden_size * (self.num_kv_heads + 1) * self.adapter
        vocabulary = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_layers * layer + vocabulary + self.hidden_size


def require(holds: bool, name: str, given: Any, allowed: str) -> None:
    """Raise ``ValueError`` with what was given and what is allowed, unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}={given!r}: must be {allowed}")

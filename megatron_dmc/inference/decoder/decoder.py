"""Models of every family in plain PyTorch, from any checkpoint: one body, and attention given by the caller.

Legend: S positions of whole sequences, T packed new tokens, B sequences, H hidden size, N query heads, G KV heads,
D head dim, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.checkpoint.source import Source
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE, CacheShape, PagedKVCache
from megatron_dmc.inference.decoder.layer_attention import Attention, CachedAttention, DecisionTrace, WholeAttention
from megatron_dmc.inference.decoder.linear import Linear
from megatron_dmc.inference.decoder.parallel import ALONE, TensorParallel
from megatron_dmc.methods import Method, method_of
from megatron_dmc.methods.step import Step
from megatron_dmc.models.config import DTYPES
from megatron_dmc.models.tensors import by_hf_name, hf_name
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.kv_quantization import AUTO, find_kv_format
from megatron_dmc.ops.rope import inverse_frequencies


@dataclass(frozen=True)
class LayerWeights:
    """One transformer layer."""

    attention_norm: Tensor
    qkv: Linear
    """Query, key and value projections, one above the other."""
    attention_output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    """Gate and up projections, one above the other."""
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    """Norms over the channels of each query and key head, in families that have them."""
    decision_norm: Tensor | None = None
    decision: Tensor | None = None
    """The adapter that decides, in models that have one: norm and projection of the hidden state, float32."""


class Decoder:
    """A model that reads tokens and writes its cache; inference alone, no gradients.

    Args:
        source: checkpoint or exported model.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps the stored one.
        device: where it computes.
        method: how the cache is kept; None: as the model was trained.
        parallel: the ranks that hold the model together; each reads its share of it.

    Raises:
        ValueError: a tensor is missing or has another shape than the configuration says; an unknown dtype; ranks that
            cannot have equally many heads.
    """

    def __init__(
        self,
        source: Source,
        *,
        dtype: str | None = None,
        device: torch.device | str = "cpu",
        method: Method | None = None,
        parallel: TensorParallel = ALONE,
    ) -> None:
        self.config = source.config
        self.parallel = parallel
        parallel.check(self.config)
        self.share = parallel.share(self.config)
        self.settings = source.dmc
        dtype = dtype or self.config.dtype
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.device = torch.device(device)
        self.method = method or method_of(self.settings)
        frequencies = inverse_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        self.inverse_frequencies = frequencies.to(self.device)
        self._load(source)

    def _load(self, source: Source) -> None:
        config = self.config

        def load(role: str, layer: int | None = None, dtype: torch.dtype = self.dtype) -> Tensor:
            name = hf_name(config, role, layer)
            entry, place = by_hf_name(config)[name]
            shape, axis = entry.hf_shapes(config)[place], entry.row.layout.axis
            if axis is None or self.parallel.size == 1:
                tensor = source.tensor(name)
            else:
                cut = self.parallel.cut(axis, shape[axis])
                tensor, shape = source.tensor(name, cut), cut.shape(shape)
            if tensor.shape != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}: the model's configuration says {shape}")
            return tensor.to(self.device, dtype)

        def stacked(layer: int, *roles: str) -> Tensor:
            return torch.cat([load(role, layer) for role in roles])

        def load_layer(layer: int) -> LayerWeights:
            return LayerWeights(
                attention_norm=load("attention_norm", layer),
                qkv=Linear(
                    stacked(layer, "q", "k", "v"),
                    stacked(layer, "q_bias", "k_bias", "v_bias") if config.qkv_bias else None,
                ),
                attention_output=Linear(load("attention_output", layer)),
                mlp_norm=load("mlp_norm", layer),
                gate_up=Linear(stacked(layer, "gate", "up")),
                down=Linear(load("down", layer)),
                q_norm=load("q_norm", layer) if config.qk_norm else None,
                k_norm=load("k_norm", layer) if config.qk_norm else None,
                decision_norm=load("decision_norm", layer, torch.float32) if config.adapter else None,
                decision=load("decision", layer, torch.float32) if config.adapter else None,
            )

        self.embedding = load("embedding")
        self.layers = [load_layer(layer) for layer in range(config.num_layers)]
        self.final_norm = load("final_norm")
        self.output = Linear(self.embedding if config.tie_word_embeddings else load("output"))

    def with_method(self, method: Method) -> Decoder:
        """The same weights, not copied, whose cache is kept by another method."""
        other = copy.copy(self)
        other.method = method
        return other

    def new_cache(
        self,
        num_sequences: int,
        *,
        block_size: int = DEFAULT_BLOCK_SIZE,
        num_blocks: int | None = None,
        kv_dtype: str = AUTO.name,
    ) -> PagedKVCache:
        """An empty cache for this rank's heads; see :class:`PagedKVCache`.

        Args:
            num_sequences: held at once.
            block_size: entries per block.
            num_blocks: of all ranks.
            kv_dtype: what closed entries are stored as, a name of ``KV_FORMATS``.

        Raises:
            ValueError: an unknown format, or no room for the pool.
        """
        if num_blocks is not None:
            num_blocks = max(1, num_blocks // self.parallel.size)
        shape = CacheShape(
            num_layers=self.config.num_layers,
            num_kv_heads=self.share.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            kv_format=find_kv_format(kv_dtype),
            state=self.method.state(self.config.head_dim),
            only_newest_changes=self.method.only_newest_changes,
            block_size=block_size,
            max_tokens=self.config.max_position_embeddings,
        )
        return PagedKVCache(shape, num_sequences, num_blocks=num_blocks, device=self.device)

    @torch.no_grad()
    def forward(self, token_SB: Tensor, trace: DecisionTrace | None = None) -> Tensor:
        """Hidden states [S, B, H] of whole sequences, with hard decisions and without a cache.

        Raises:
            ValueError: the method has no form for whole sequences.
        """
        geometry = Geometry(token_SB.shape[0], token_SB.shape[1], self.inverse_frequencies)
        return self._body(token_SB, WholeAttention(self.method, geometry, trace, self.parallel))

    @torch.no_grad()
    def read(
        self,
        token_T: Tensor,
        counts: Sequence[int],
        cache: PagedKVCache,
        rows: Sequence[int],
        *,
        ends_prompt: bool = True,
        trace: DecisionTrace | None = None,
    ) -> Tensor:
        """Read new tokens of some sequences behind what the cache holds of them: prompts, parts of them, single tokens.

        Tokens of one pass attend to one another as they are. In a cache of 8 bits they see those of former passes
        quantised, so hidden states depend a little on how a text is cut, and with them what is stored; the same cut
        gives the same bits.

        Args:
            token_T: the new tokens, those of one sequence after those of another.
            counts: new tokens of each sequence, at least 1.
            cache: what was read before; holds the new tokens afterwards.
            rows: row of each sequence.
            ends_prompt: whether prompts are complete with these tokens.
            trace: filled with the decisions of each layer.

        Returns:
            Hidden states [T, H].

        Raises:
            OutOfBlocks: the cache is of fixed size and too small; it is as it was.
            ValueError: a part of a text, which the method can only read whole.
        """
        positions = [cache.num_tokens[row] for row in rows]
        step = Step(rows, positions, counts, self.inverse_frequencies, ends_prompt, self.parallel.ranks)
        if not self.method.reads_parts and not step.decodes and (step.continues or not ends_prompt):
            raise ValueError(f"{self.method.name} reads a prompt whole, or one token at a time: parts were given")
        cache.reserve(rows, counts)
        hidden_TH = self._body(token_T, CachedAttention(self.method, cache, step, trace, self.parallel))
        cache.commit(step)
        return hidden_TH

    @torch.no_grad()
    def step(self, token_B: Tensor, attention: Attention) -> Tensor:
        """Hidden states [B, H] of one new token of each sequence, by an attention that keeps its own books."""
        return self._body(token_B, attention)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [..., V] from hidden states [..., H]."""
        return self.parallel.gather(self.output(hidden), self.config.vocab_size).float()

    def _body(self, tokens: Tensor, attention: Attention) -> Tensor:
        """Hidden states [..., H] of tokens [...]."""
        hidden = self.parallel.embedding(tokens, self.embedding, self.config.vocab_size)
        for index, layer in enumerate(self.layers):
            mixed = attention(index, *self._project(hidden, layer), self._adapt(hidden, layer)).flatten(-2)
            hidden += self.parallel.sum(layer.attention_output(mixed))
            gate, up = layer.gate_up(self._norm(hidden, layer.mlp_norm)).chunk(2, dim=-1)
            hidden += self.parallel.sum(layer.down(F.silu(gate, inplace=True).mul_(up)))
        return self._norm(hidden, self.final_norm)

    def _project(self, hidden: Tensor, layer: LayerWeights) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [..., N, D], keys and values [..., G, D] of this rank."""
        share = self.share
        heads = [share.num_attention_heads, share.num_kv_heads, share.num_kv_heads]
        qkv = layer.qkv(self._norm(hidden, layer.attention_norm))
        q, k, v = qkv.unflatten(-1, (sum(heads), share.head_dim)).split(heads, dim=-2)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
        return q, k, v

    def _adapt(self, hidden: Tensor, layer: LayerWeights) -> Tensor | None:
        """What the adapter of a layer makes of the states before its first norm, float32 [..., G of this rank].

        Whatever the dtype of the model: rounding would change decisions.
        """
        if layer.decision_norm is None or layer.decision is None:
            return None
        return F.linear(self._norm(hidden.float(), layer.decision_norm), layer.decision)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32; multiplied by ``weight`` in the dtype of ``x``."""
        eps = self.config.rms_norm_eps
        if x.dtype == torch.float32:
            return F.rms_norm(x, weight.shape, weight, eps)
        return weight * F.rms_norm(x.float(), weight.shape, eps=eps).to(x.dtype)

"""Llama with a compressed cache for transformers: its modules and weights, our attention between the projections.

A forward pass takes hard decisions; it equals decoding token by token. Padding is honoured on either side: the tokens
of all rows are packed one row after the other before the first layer, and go back to their places behind the last.

Legend: S columns, B batch, H hidden size, T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel

from megatron_dmc.hf.cache_dmc_llama import DMCCache
from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig
from megatron_dmc.inference.decoder.layer_attention import Attention, CachedAttention, WholeAttention
from megatron_dmc.methods import method_of
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.rope import inverse_frequencies


class DMCLlamaAttention(LlamaAttention):
    """Llama's projections around attention over packed tokens."""

    def forward(self, hidden_states: Tensor, *, dmc_attention: Attention, **unused: Any) -> tuple[Tensor, None]:
        """``dmc_attention`` comes through the decoder layer from :meth:`DMCLlamaModel.forward`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states[0]).unflatten(-1, (-1, self.head_dim)) for project in projections)
        return self.o_proj(dmc_attention(self.layer_idx, q, k, v).flatten(-2)).unsqueeze(0), None


class DMCLlamaModel(LlamaModel):
    """The decoder without its output layer."""

    config_class = DMCLlamaConfig

    def __init__(self, config: DMCLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = DMCLlamaAttention(config, index)
        self.shape, self.method = config.shape(), method_of(config.settings())
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DMCCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens.

        Args:
            input_ids, inputs_embeds: one of them, [B, S] or [B, S, H].
            attention_mask: [B, tokens so far + S]; zeros (padding) before or after the tokens of a row, not between.
            position_ids: not needed, positions count the tokens of each row; other positions are refused.
            past_key_values: a :class:`DMCCache`; the tokens follow those in it.
            use_cache: make a cache if none is given (default: as the configuration says, never in training mode).

        Raises:
            ValueError: another kind of cache, a mask with holes, other positions, attention weights asked for.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if output_attentions:
            raise ValueError("output_attentions=True: attention weights are never formed; leave it out")
        if past_key_values is not None and not isinstance(past_key_values, DMCCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}: this model needs a DMCCache, or none to start"
            )
        hidden_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = DMCCache(self.config) if use_cache and past_key_values is None else past_key_values
        if cache is not None and cache.num_columns:
            shown_BS = _all_shown(attention_mask, hidden_BSH)
        else:
            shown_BS = _shown(attention_mask, position_ids, hidden_BSH)
        states = self._read(hidden_BSH, shown_BS, cache)
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _read(self, hidden_BSH: Tensor, shown_BS: Tensor, cache: DMCCache | None) -> list[Tensor]:
        """Hidden states before each layer, and those after the last norm; those of padding are 0."""
        counts = shown_BS.sum(dim=1).tolist()
        frequencies = inverse_frequencies(self.shape.head_dim, self.shape.rope_theta, self.shape.rope_scaling)
        frequencies = frequencies.to(hidden_BSH.device)
        if cache is None:
            whole = Step(range(len(counts)), [0] * len(counts), counts, frequencies)
            states = self._layers(hidden_BSH[shown_BS], _Packed(WholeAttention(self.method, whole.geometry)))
        else:
            paged, rows = cache.prepare(len(counts), hidden_BSH.dtype, hidden_BSH.device)
            paged.reserve(rows, counts)
            step = Step(rows, [paged.num_tokens[row] for row in rows], counts, frequencies)
            states = self._layers(hidden_BSH[shown_BS], CachedAttention(self.method, paged, step))
            paged.commit(step)
            cache.num_columns += hidden_BSH.shape[1]
        return [hidden_BSH.new_zeros(hidden_BSH.shape).index_put((shown_BS,), state) for state in states]

    def _layers(self, hidden_TH: Tensor, attention: Attention) -> list[Tensor]:
        states = []
        hidden_1TH = hidden_TH.unsqueeze(0)
        for layer in self.layers:
            states.append(hidden_1TH[0])
            hidden_1TH = layer(hidden_1TH, dmc_attention=attention)
        return [*states, self.norm(hidden_1TH)[0]]


class _Packed:
    """Whole sequences as one row of packed tokens, [T, ...]."""

    def __init__(self, attention: WholeAttention) -> None:
        self._attention = attention

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attention(layer, *(x.unsqueeze(1) for x in (q, k, v))).squeeze(1)


class DMCLlamaForCausalLM(LlamaForCausalLM):
    """The decoder with its output layer: forward passes, loss and ``generate`` (greedy or sampled)."""

    config_class = DMCLlamaConfig
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _is_stateful = True
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    def __init__(self, config: DMCLlamaConfig) -> None:
        # Past LlamaForCausalLM's own, which would build a decoder of the other kind.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DMCLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate() must not make a cache: the first forward pass makes a DMCCache.
        return False

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' paged batching has one table per request, a compressed cache one per head."""
        raise ValueError("continuous batching of transformers keeps one length per request: use megatron_dmc's engine")


def _shown(mask: Tensor | None, position_ids: Tensor | None, hidden_BSH: Tensor) -> Tensor:
    """bool [B, S]: which columns of a first pass hold tokens; padding stands before or after them."""
    shown_BS = torch.ones(hidden_BSH.shape[:2], dtype=torch.bool, device=hidden_BSH.device)
    if mask is not None:
        if mask.shape != shown_BS.shape:
            raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: must be {tuple(shown_BS.shape)}")
        shown_BS = mask.bool()
    position_BS = shown_BS.cumsum(dim=1) - 1
    first_B1, last_B1 = shown_BS.int().argmax(dim=1, keepdim=True), position_BS[:, -1:]
    column_S = torch.arange(shown_BS.shape[1], device=shown_BS.device)
    expected_BS = (column_S >= first_B1) & (column_S <= first_B1 + last_B1)
    if not shown_BS.any(dim=1).all() or not torch.equal(shown_BS, expected_BS):
        raise ValueError("attention_mask has a row without tokens or with a hole: padding goes before or after a text")
    if position_ids is not None:
        given_BS = position_ids.expand_as(position_BS)
        if not torch.equal(given_BS[shown_BS], position_BS[shown_BS]):
            raise ValueError("position_ids must count the tokens of each row from 0: leave them out")
    return shown_BS


def _all_shown(mask: Tensor | None, hidden_BSH: Tensor) -> Tensor:
    """bool [B, S], all True: tokens that follow others stand without padding."""
    sequence_length = hidden_BSH.shape[1]
    if mask is not None and not mask[:, -sequence_length:].all():
        raise ValueError("attention_mask hides tokens that follow those in the cache: only a first pass is padded")
    return torch.ones(hidden_BSH.shape[:2], dtype=torch.bool, device=hidden_BSH.device)

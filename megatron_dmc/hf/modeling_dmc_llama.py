"""Llama with a compressed cache for transformers: its modules and weights, our attention between the projections.

A forward pass takes hard decisions; it equals decoding token by token. Padding is honoured on either side.

Legend: S sequence, B batch, H hidden size, N query heads, G KV heads, D head dim.
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
from megatron_dmc.inference.decoder.layer_attention import (
    Attention,
    AttentionSettings,
    DecodeAttention,
    FullSequenceAttention,
    PrefillAttention,
)


class DMCLlamaAttention(LlamaAttention):
    """Llama's projections around one of the three ways through attention."""

    def forward(self, hidden_states: Tensor, *, dmc_attention: Attention, **unused: Any) -> tuple[Tensor, None]:
        """``dmc_attention`` comes through the decoder layer from :meth:`DMCLlamaModel.forward`."""
        hidden_SBH = hidden_states.transpose(0, 1)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_SBND, k_SBGD, v_SBGD = (project(hidden_SBH).unflatten(-1, (-1, self.head_dim)) for project in projections)
        output_SBND = dmc_attention(self.layer_idx, q_SBND, k_SBGD, v_SBGD)
        return self.o_proj(output_SBND.flatten(2)).transpose(0, 1), None


class OwnAttention:
    """Whatever ``attn_implementation`` asks for, attention is the model's own: nothing is refused."""

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return "eager"


class DMCLlamaModel(OwnAttention, LlamaModel):
    """The decoder without its output layer."""

    config_class = DMCLlamaConfig

    def __init__(self, config: DMCLlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = DMCLlamaAttention(config, index)
        self.shape, self.settings = config.shape(), config.settings()
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
            past_key_values: a :class:`DMCCache`; with tokens in it these are read one by one.
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
            states = self._decode(hidden_BSH, attention_mask, cache)
        else:
            states = self._read(hidden_BSH, attention_mask, position_ids, cache)
        if cache is not None:
            cache.num_columns += hidden_BSH.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _read(
        self, hidden_BSH: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: DMCCache | None
    ) -> list[Tensor]:
        """Whole sequences; with a cache it holds them afterwards."""
        batch, sequence_length = hidden_BSH.shape[:2]
        start_B, length_B = _spans(mask, hidden_BSH)
        column_S = torch.arange(sequence_length, device=hidden_BSH.device)
        _check_positions(position_ids, column_S - start_B.unsqueeze(1), length_B)
        # Each row is turned round so that its tokens come first and its padding last: position is then column.
        hidden_BSH = _turned(hidden_BSH, column_S + start_B.unsqueeze(1))
        whole = FullSequenceAttention(self._settings_on(hidden_BSH.device), sequence_length)
        attention: Attention = whole
        if cache is not None:
            paged, rows_B = cache.prepare(batch, hidden_BSH.dtype, hidden_BSH.device)
            attention = PrefillAttention(whole, paged, rows_B, length_B)
            paged.num_tokens[rows_B] = length_B
        return [_turned(states, column_S - start_B.unsqueeze(1)) for states in self._layers(hidden_BSH, attention)]

    def _decode(self, hidden_BSH: Tensor, mask: Tensor | None, cache: DMCCache) -> list[Tensor]:
        """The next tokens of each sequence, one by one."""
        batch, sequence_length = hidden_BSH.shape[:2]
        if mask is not None and not mask[:, -sequence_length:].all():
            raise ValueError("attention_mask hides tokens that follow those in the cache: only a first pass is padded")
        paged, rows_B = cache.prepare(batch, hidden_BSH.dtype, hidden_BSH.device)
        settings = self._settings_on(hidden_BSH.device)
        steps = []
        for column in range(sequence_length):
            attention = DecodeAttention(settings, paged, rows_B)
            steps.append(self._layers(hidden_BSH[:, column : column + 1], attention))
            paged.num_tokens[rows_B] += 1
        return [torch.cat(states, dim=1) for states in zip(*steps, strict=True)]

    def _layers(self, hidden_BSH: Tensor, attention: Attention) -> list[Tensor]:
        """Hidden states before each layer, and those after the last norm."""
        states = []
        for layer in self.layers:
            states.append(hidden_BSH)
            hidden_BSH = layer(hidden_BSH, dmc_attention=attention)
        return [*states, self.norm(hidden_BSH)]

    def _settings_on(self, device: torch.device) -> AttentionSettings:
        return AttentionSettings(self.shape, self.settings, device)


class DMCLlamaForCausalLM(OwnAttention, LlamaForCausalLM):
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


def _spans(mask: Tensor | None, hidden_BSH: Tensor) -> tuple[Tensor, Tensor]:
    """First column and number of the tokens of each row, int64 [B]."""
    batch, sequence_length = hidden_BSH.shape[:2]
    if mask is None:
        whole_B = torch.full((batch,), sequence_length, device=hidden_BSH.device)
        return torch.zeros_like(whole_B), whole_B
    if mask.shape != (batch, sequence_length):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}: must be {(batch, sequence_length)}")
    shown_BS = mask.bool()
    length_B = shown_BS.sum(dim=1)
    start_B = shown_BS.int().argmax(dim=1)
    column_S = torch.arange(sequence_length, device=mask.device)
    expected_BS = (column_S >= start_B.unsqueeze(1)) & (column_S < (start_B + length_B).unsqueeze(1))
    if not length_B.all() or not torch.equal(shown_BS, expected_BS):
        raise ValueError("attention_mask has a row without tokens or with a hole: padding goes before or after a text")
    return start_B, length_B


def _check_positions(position_ids: Tensor | None, position_BS: Tensor, length_B: Tensor) -> None:
    if position_ids is None:
        return
    is_token_BS = (position_BS >= 0) & (position_BS < length_B.unsqueeze(1))
    if not torch.equal(position_ids.expand_as(position_BS)[is_token_BS], position_BS[is_token_BS]):
        raise ValueError("position_ids must count the tokens of each row from 0: leave them out")


def _turned(hidden_BSH: Tensor, column_BS: Tensor) -> Tensor:
    """Rows read from other columns, which wrap around."""
    index_BS1 = (column_BS % hidden_BSH.shape[1]).unsqueeze(-1)
    return hidden_BSH.gather(1, index_BS1.expand(hidden_BSH.shape))

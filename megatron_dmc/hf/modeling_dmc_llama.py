"""Llama with a compressed cache for transformers: its modules and weights, our attention between the projections.

A forward pass takes hard decisions; it equals decoding token by token. Padding is honoured wherever it stands: the
tokens of all rows are packed one row after the other before the first layer, and go back to their places behind the
last.

Legend: S columns of a pass, C columns with those read before, B batch, H hidden size, T packed tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig, GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel
from transformers.utils import can_return_tuple

from megatron_dmc.hf.adapter import adapter_output, add_adapter
from megatron_dmc.hf.cache_dmc_llama import DMCCache
from megatron_dmc.hf.columns import shown_columns
from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig
from megatron_dmc.inference.decoder.layer_attention import Attention, CachedAttention, WholeAttention
from megatron_dmc.methods import method_of
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.rope import inverse_frequencies

_MODES = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)


class DMCLlamaAttention(LlamaAttention):
    """Llama's projections around attention over packed tokens."""

    def forward(
        self, hidden_states: Tensor, *, dmc_attention: Attention, dmc_hidden: Tensor, **unused: Any
    ) -> tuple[Tensor, None]:
        """``dmc_attention`` comes through the decoder layer from :meth:`DMCLlamaModel.forward`, and so does the hidden
        state before the layer's first norm.
        """
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states[0]).unflatten(-1, (-1, self.head_dim)) for project in projections)
        whole = self.config.num_key_value_heads
        if k.shape[-2] != whole:
            raise ValueError(
                f"{k.shape[-2]} of {whole} KV heads are here: transformers' tp_plan does not share out the cache; use "
                "torchrun with megatron-dmc generate"
            )
        adapter = adapter_output(self, dmc_hidden[0])
        return self.o_proj(dmc_attention(self.layer_idx, q, k, v, adapter).flatten(-2)).unsqueeze(0), None


class OwnAttention:
    """Whatever ``attn_implementation`` asks for, attention is the model's own: nothing is refused."""

    def _check_and_adjust_attn_implementation(self, *args: Any, **kwargs: Any) -> str:
        return "eager"


class DMCLlamaModel(OwnAttention, LlamaModel):
    """The decoder without its output layer."""

    config_class = DMCLlamaConfig

    def __init__(self, config: DMCLlamaConfig) -> None:
        super().__init__(config)
        self.shape, self.method = config.shape(), method_of(config.settings())
        for index, layer in enumerate(self.layers):
            layer.self_attn = DMCLlamaAttention(config, index)
            add_adapter(layer.self_attn, self.shape)
        self.post_init()

    @torch.compiler.disable(reason="a compressed cache has lengths that only the tokens decide")
    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DMCCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens. Under ``torch.compile`` too it runs as it is written.

        Args:
            input_ids, inputs_embeds: one of them, [B, S] or [B, S, H].
            attention_mask: [B, C]; zeros are padding, which is skipped.
            position_ids: count the tokens of each row, [1 or B, S]. Needed only where padding stands between tokens.
            past_key_values: a :class:`DMCCache`; the tokens follow those in it.
            use_cache: make a cache if none is given (default: as the configuration says, never in training mode). No
                gradient passes a cache: ``backward`` then raises.
            output_hidden_states: those before each layer and after the last norm; 0 at padding.

        Raises:
            ValueError: another kind of cache, another mask than the cache was read with, other positions, attention
                weights asked for, packed documents.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        _refuse(others)
        hidden_BSH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        cache = DMCCache(self.config) if use_cache and past_key_values is None else past_key_values
        num_read = [0] * len(hidden_BSH)
        if cache is not None:
            _check_cache(cache, self)
            num_read = cache.num_tokens(len(hidden_BSH))
        columns_read = 0 if cache is None else cache.num_columns
        shown_BS = shown_columns(hidden_BSH, attention_mask, position_ids, num_read, columns_read)
        states = self._read(hidden_BSH, shown_BS, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _read(self, hidden_BSH: Tensor, shown_BS: Tensor, cache: DMCCache | None) -> list[Tensor]:
        """Hidden states before each layer, and those after the last norm; those of padding are 0."""
        counts = shown_BS.sum(dim=1).tolist()
        reading = [row for row, count in enumerate(counts) if count]
        counts = [counts[row] for row in reading]
        hidden_TH = hidden_BSH[shown_BS]
        if not reading:
            states = [hidden_TH] * (len(self.layers) + 1)
        elif cache is None:
            whole = Step(reading, [0] * len(counts), counts, self._frequencies(hidden_TH))
            states = self._layers(hidden_TH, _Packed(WholeAttention(self.method, whole.geometry)))
        else:
            states = self._read_cached(hidden_TH, len(hidden_BSH), reading, counts, cache)
        if cache is not None:
            cache.num_columns += hidden_BSH.shape[1]
        return [hidden_BSH.new_zeros(hidden_BSH.shape).index_put((shown_BS,), state) for state in states]

    def _read_cached(
        self, hidden_TH: Tensor, batch: int, reading: list[int], counts: list[int], cache: DMCCache
    ) -> list[Tensor]:
        """As :meth:`_read`, of packed tokens of the rows ``reading``."""
        with torch.no_grad():
            paged, rows = cache.prepare(batch, hidden_TH.dtype, hidden_TH.device)
            rows = [rows[row] for row in reading]
            paged.reserve(rows, counts)
            positions = [paged.num_tokens[row] for row in rows]
            step = Step(rows, positions, counts, self._frequencies(hidden_TH))
            states = self._layers(hidden_TH, CachedAttention(self.method, paged, step))
            paged.commit(step)
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return [_NoGradient.apply(state.requires_grad_()) for state in states]
        return states

    def _layers(self, hidden_TH: Tensor, attention: Attention) -> list[Tensor]:
        states = []
        hidden_1TH = hidden_TH.unsqueeze(0)
        for layer in self.layers:
            states.append(hidden_1TH[0])
            hidden_1TH = layer(hidden_1TH, dmc_attention=attention, dmc_hidden=hidden_1TH)
        return [*states, self.norm(hidden_1TH)[0]]

    def _frequencies(self, hidden_TH: Tensor) -> Tensor:
        """Of the rotary angles, where the tokens are."""
        shape = self.shape
        return inverse_frequencies(shape.head_dim, shape.rope_theta, shape.rope_scaling).to(hidden_TH.device)


class _Packed:
    """Whole sequences as one row of packed tokens, [T, ...]."""

    def __init__(self, attention: WholeAttention) -> None:
        self._attention = attention

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor | None = None) -> Tensor:
        adapter_T1G = None if adapter is None else adapter.unsqueeze(1)
        return self._attention(layer, *(x.unsqueeze(1) for x in (q, k, v)), adapter_T1G).squeeze(1)


class _NoGradient(torch.autograd.Function):
    """The identity, whose backward pass says why there is none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        raise ValueError("no gradient passes a compressed cache: call the model with use_cache=False, or model.train()")


class DMCLlamaForCausalLM(OwnAttention, LlamaForCausalLM):
    """The decoder with its output layer: forward passes, loss and ``generate``."""

    config_class = DMCLlamaConfig
    _supports_sdpa = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False
    _is_stateful = True
    _supported_generation_modes = _MODES

    def __init__(self, config: DMCLlamaConfig) -> None:
        # Past LlamaForCausalLM's own, which would build a decoder of the other kind.
        super(LlamaForCausalLM, self).__init__(config)
        self.model = DMCLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: transformers' paged batching has one table per request, a compressed cache one per head."""
        raise ValueError("continuous batching of transformers keeps one length per request: use megatron_dmc's engine")

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put a :class:`DMCCache` where transformers would put its own."""
        mask, asked = model_kwargs.get("attention_mask"), generation_config.cache_implementation
        if mask is not None and not mask[:, -1].all():
            raise ValueError(
                "attention_mask ends with padding in some row: generate() continues the last column; pad before the "
                "texts (padding_side='left')"
            )
        if asked not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={asked!r}: this model keeps its own compressed cache; leave it out")
        generation_config.cache_implementation = None
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DMCCache(self.config)
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _validate_generation_mode(self, generation_mode: GenerationMode, *args: Any, **kwargs: Any) -> None:
        if generation_mode not in _MODES:
            raise ValueError(
                f"{generation_mode.value} does not work with a compressed cache: assisted and contrastive decoding "
                "take back tokens, which are merged or evicted by then; use greedy search, sampling or beams"
            )
        super()._validate_generation_mode(generation_mode, *args, **kwargs)


def _refuse(arguments: dict[str, Any]) -> None:
    """What transformers passes through, and cannot be had."""
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions=True: attention weights are never formed; leave it out")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: documents packed in one row are not kept apart; give each a row of its own")
    if arguments.get("is_causal") is False:
        raise ValueError("is_causal=False: later tokens decide what becomes of earlier ones; leave it out")


def _check_cache(cache: Any, model: DMCLlamaModel) -> None:
    if not isinstance(cache, DMCCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}: this model needs a DMCCache, or none to start")
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        made, needed = getattr(cache.shape, name), getattr(model.shape, name)
        if made != needed:
            raise ValueError(f"past_key_values was made for {name}={made}, the model has {needed}: use a new cache")
    if cache.settings != model.config.settings():
        raise ValueError("past_key_values was made for other settings of DMC: use a new cache")

"""What transformers offers and a compressed cache cannot do: each says why, and changes nothing."""

import re

import pytest
import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.hugging_face import to_hf_config
from tests.hf.exported import GREEDY, SETTINGS, padded, random_tokens

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("megatron_dmc.hf")


MERGED = "take back tokens, which are merged or evicted by then; use greedy search, sampling or beams"


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
        ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "contrastive_search"),
        ({"dola_layers": "high", "trust_remote_code": True}, "dola_generation"),
    ],
)
def test_other_modes_of_generation_are_refused(model, options, mode):
    with pytest.raises(ValueError, match=f"^{mode} does not work with a compressed cache: .*{MERGED}"):
        model.generate(random_tokens(1, 5), **(GREEDY | options))


def test_assisted_decoding_is_refused_in_either_role(model):
    with pytest.raises(ValueError, match=f"^assisted_generation does not work.*{MERGED}"):
        model.generate(random_tokens(1, 5), assistant_model=model, **GREEDY)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**to_hf_config(model.config.shape())))
    with pytest.raises(ValueError, match="what is merged or evicted cannot be brought back"):
        plain.generate(random_tokens(1, 5), assistant_model=model, **(GREEDY | {"max_new_tokens": 15}))


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static", "quantized"])
def test_other_caches_are_refused(model, name):
    with pytest.raises(ValueError, match=f"cache_implementation='{name}': this model keeps its own compressed cache"):
        model.generate(random_tokens(1, 5), cache_implementation=name, **GREEDY)
    static = transformers.StaticCache(config=model.config, max_cache_len=50)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache: this model needs a DMCCache"):
        model.generate(random_tokens(1, 5), past_key_values=static, **GREEDY)


@pytest.mark.parametrize("call", ["init_continuous_batching", "generate_batch", "paged"])
def test_continuous_batching_is_refused(model, call):
    with pytest.raises(ValueError, match="continuous batching of transformers keeps one length per request"):
        if call == "paged":
            model.generate(random_tokens(1, 5), cache_implementation="paged", **GREEDY)
        else:
            getattr(model, call)([[1, 2, 3]])


@pytest.mark.parametrize(("operation", "arguments"), [("crop", [-1]), ("activate_past_recording", [])])
def test_the_cache_refuses_to_take_back_tokens(model, operation, arguments):
    with torch.no_grad():
        cache = model(random_tokens()).past_key_values
    before = cache.usage()
    with pytest.raises(ValueError, match=f"^{operation} .*: what is merged or evicted cannot be brought back"):
        getattr(cache, operation)(*arguments)
    assert cache.usage() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values is a DynamicCache: this model needs"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "attention_mask has padding between tokens of a row"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask has shape \(1, 4\): must be \(1, 5\)"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention_mask has shape \(1, 1, 5, 5\): must be \(1, 5\)"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}, "position_ids must count the tokens of each row"),
        ({"position_ids": torch.arange(5) + 3}, r"position_ids has shape \(5,\): must be \(1, 5\), or left out"),
        ({"position_ids": torch.arange(4)[None]}, r"position_ids has shape \(1, 4\): must be \(1, 5\), or left out"),
        ({"output_attentions": True}, "attention weights are never formed"),
        ({"inputs_embeds": torch.zeros(1, 5, 32)}, "either input_ids or inputs_embeds"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "documents packed in one row are not kept apart"),
        ({"is_causal": False}, "is_causal=False: later tokens decide"),
    ],
)
def test_wrong_input_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        model(random_tokens(1, 5), **options)


def test_attention_weights_of_a_text_are_refused(model):
    with pytest.raises(ValueError, match="output_attentions=True: attention weights are never formed"):
        model.generate(random_tokens(1, 5), output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_padding_behind_a_text_is_not_continued(model):
    token_BS, mask_BS = padded([[5, 6, 7], [8]], "right")
    with pytest.raises(ValueError, match=re.escape("pad before the texts (padding_side='left')")):
        model.generate(token_BS, attention_mask=mask_BS, **GREEDY)


def test_what_a_cache_cannot_follow_is_refused(model):
    """Other batches and models, masks that hide what was read, positions and texts that begin anew."""
    cache, token_BS = hf.DMCCache(model.config), random_tokens(3, 5)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.usage()
    with torch.no_grad():
        model(token_BS, past_key_values=cache)
    before = cache.usage()
    shorter = torch.ones(3, 7)
    shorter[1, 0] = 0
    other_settings = hf.DMCLlamaConfig(**(model.config.to_dict() | {"dmc": DMCConfig(window_size=5).to_dict()}))
    other_shape = hf.DMCLlamaConfig(**(model.config.to_dict() | {"num_hidden_layers": 3}))
    for tokens_BS, options, message in [
        (token_BS[:2], {}, "the cache holds 3 sequences, 2 were given"),
        (token_BS[:, :0], {}, "no new tokens were given"),
        (token_BS[:, :2], {"attention_mask": torch.ones(3, 2)}, r"must be \(3, 7\), with a column for every token"),
        (token_BS[:, :2], {"attention_mask": shorter}, "shows 4 earlier tokens in row 1, the cache has read 5"),
        (token_BS[:, :2], {"position_ids": torch.arange(2)[None]}, "position_ids must count .* on from those in the"),
        (token_BS, {"past_key_values": hf.DMCCache(other_settings)}, "made for other settings of DMC"),
        (token_BS, {"past_key_values": hf.DMCCache(other_shape)}, "made for num_layers=3, the model has 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(tokens_BS, **({"past_key_values": cache} | options))
    with pytest.raises(ValueError, match="no new tokens were given: generate.. takes the whole text"):
        model.generate(token_BS[:, :2], past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="use a new cache for a text that begins anew"):
        model.generate(token_BS, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"written by the models of megatron_dmc\.hf only"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)
    assert cache.usage() == before


def test_a_share_of_the_heads_is_refused(model):
    """As a tensor-parallel plan of transformers would leave it."""
    attention = model.model.layers[0].self_attn
    narrow = torch.nn.Linear(model.config.hidden_size, attention.k_proj.out_features // 2, bias=False)
    whole, attention.k_proj = attention.k_proj, narrow
    try:
        with pytest.raises(ValueError, match="1 of 2 KV heads are here: .* use torchrun with megatron-dmc"):
            model(random_tokens(1, 5))
    finally:
        attention.k_proj = whole


def test_settings_of_another_release_are_refused():
    with pytest.raises(ValueError, match="schema_version=99: this release reads 1"):
        hf.DMCLlamaConfig(dmc={**SETTINGS.to_dict(), "schema_version": 99})
    with pytest.raises(ValueError, match="attention_bias=True is not supported"):
        hf.DMCLlamaForCausalLM(hf.DMCLlamaConfig(dmc=SETTINGS.to_dict(), hidden_size=32, attention_bias=True))

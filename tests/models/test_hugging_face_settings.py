"""Settings of ``config.json``: what changes nothing passes, what would change the computation is refused by name."""

import pytest

from megatron_dmc.models.families import LLAMA
from megatron_dmc.models.hugging_face_settings import (
    FIXED_SETTINGS,
    HARMLESS_SETTINGS,
    READ_SETTINGS,
    check_settings,
)

LLAMA_LIKE = """
    llama mistral ministral qwen2 qwen3 smollm3 granite cohere cohere2 olmo olmo2 olmo3 phi3 gemma gemma2 stablelm
    starcoder2 helium arcee seed_oss exaone4 glm glm4 hunyuan_v1_dense ernie4_5 diffllama nemotron
"""


@pytest.mark.parametrize(
    "given",
    [
        {"is_llama_config": True, "rope_interleaved": False},
        {"transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "unsloth_version": "2024.9"},
        {"attn_implementation": "sdpa", "_attn_implementation": "flash_attention_2", "_flash_attn_2_enabled": True},
        {"pad_token_id": -1, "unk_token_id": 0, "forced_eos_token_id": None, "num_beams": 4, "temperature": 0.6},
        {"task_specific_params": {"a": 1}, "finetuning_task": "x", "id2label": {"0": "A"}, "architectures": ["X"]},
        {"_name_or_path": "a/b", "_model_name_or_path": "SmolLM2 135M"},
        {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0, "hidden_dropout": 0.0},
        {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 28},
        {"num_local_experts": 0, "auto_map": {}, "quantization_config": None, "rotary_pct": 1.0},
    ],
)
def test_what_changes_nothing_passes_in_silence(given):
    assert check_settings(given, LLAMA) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_interleaved", True),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8),
        ("final_logit_softcapping", 30.0),
        ("qk_layernorm", True),
        ("no_rope_layers", [1, 1, 0]),
        ("num_local_experts", 8),
        ("rotary_pct", 0.25),
        ("use_bias", True),
        ("vision_config", {"hidden_size": 8}),
        ("attention_bias", 0),
    ],
)
def test_what_is_harmless_at_one_value_is_refused_at_another(name, value):
    with pytest.raises(ValueError, match=name):
        check_settings({name: value}, LLAMA)
    with pytest.raises(ValueError, match=name):
        check_settings({name: value}, LLAMA, ignored=[name])


@pytest.mark.parametrize("value", [False, None, "", [], {}])
def test_an_unknown_setting_that_is_off_is_told(value):
    (note,) = check_settings({"frobnicate": value}, LLAMA)
    assert f"frobnicate={value!r}" in note


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "yes", [0], {"a": None}])
def test_an_unknown_setting_with_a_value_is_refused_until_the_user_says_that_it_is_harmless(value):
    given = {"frobnicate": value, "hidden_size": 8}
    with pytest.raises(ValueError, match=r"unknown settings frobnicate=.*--ignore-setting frobnicate"):
        check_settings(given, LLAMA)
    (note,) = check_settings(given, LLAMA, ignored=["frobnicate"])
    assert "frobnicate" in note


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(ValueError, match=r"\.\.\.") as refusal:
        check_settings({"frobnicate": "x" * 10_000}, LLAMA)
    assert len(str(refusal.value)) < 400


def test_the_lists_do_not_overlap():
    assert not READ_SETTINGS & FIXED_SETTINGS.keys()
    assert not HARMLESS_SETTINGS & (READ_SETTINGS | FIXED_SETTINGS.keys())


@pytest.mark.parametrize("model_type", LLAMA_LIKE.split())
def test_everything_that_llama_like_families_declare_is_known(model_type):
    auto = pytest.importorskip("transformers.models.auto.configuration_auto")
    if model_type not in auto.CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    declared = auto.CONFIG_MAPPING[model_type]().to_dict()
    assert declared.keys() <= READ_SETTINGS | FIXED_SETTINGS.keys() | HARMLESS_SETTINGS

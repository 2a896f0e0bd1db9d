"""Saved arguments and the model they describe, in both directions."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dmc.checkpoint.pickles import Record
from megatron_dmc.checkpoint.saved_arguments import (
    config_from_arguments,
    dmc_arguments,
    dmc_from_arguments,
    namespace_dict,
    read_saved_arguments,
)
from megatron_dmc.config import SINCE_2, DMCConfig
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.megatron import megatron_arguments
from megatron_dmc.ops.rope_scaling import RopeScaling
from tests.checkpoints_convert.models import TINY, VARIANTS

LLAMAS = st.builds(
    ModelConfig,
    hidden_size=st.integers(1, 512),
    num_layers=st.integers(1, 8),
    num_attention_heads=st.just(12),
    num_kv_heads=st.sampled_from([1, 2, 3, 4, 6, 12]),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    ffn_hidden_size=st.integers(1, 512),
    vocab_size=st.integers(1, 1000),
    max_position_embeddings=st.integers(1, 1 << 20),
    rms_norm_eps=st.sampled_from([1e-5, 1e-6]),
    rope_theta=st.sampled_from([10000.0, 500000.0]),
    rope_scaling=st.sampled_from(
        [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 32.0), RopeScaling("llama3", 8.0, 2.0, 5.0, 4096)]
    ),
    tie_word_embeddings=st.booleans(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


@given(LLAMAS)
def test_a_llama_survives_megatrons_arguments(config):
    assert config_from_arguments(megatron_arguments(config), 1024, "it") == config


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])
def test_other_families_survive_and_are_refused_without_what_makes_them(variant):
    arguments = megatron_arguments(VARIANTS[variant])
    assert config_from_arguments(arguments, 384, "it") == VARIANTS[variant]
    with pytest.raises(ValueError, match=f"=False: models of the family {variant} are not"):
        config_from_arguments(arguments | {"qk_layernorm": False, "add_qkv_bias": False}, 384, "it")


@pytest.mark.parametrize("variant", ["gqa", "qwen2", "qwen3"])
def test_a_checkpoint_of_megatron_itself_is_of_the_family_with_its_block(variant):
    arguments = megatron_arguments(VARIANTS[variant])
    del arguments["dmc_model_family"]
    assert config_from_arguments(arguments, 384, "it") == VARIANTS[variant]
    with pytest.raises(ValueError, match="qk_layernorm=True, add_qkv_bias=True: no family"):
        config_from_arguments(arguments | {"qk_layernorm": True, "add_qkv_bias": True}, 384, "it")


@given(st.builds(DMCConfig, window_size=st.integers(0, 64), stop_at_cr=st.none() | st.floats(1, 8)))
def test_dmc_settings_survive(dmc):
    assert dmc_from_arguments(dmc_arguments(dmc), "it") == dmc


def test_a_converted_checkpoint_describes_its_model(torch_dist, legacy):
    for directory in (torch_dist, legacy):
        settings = read_saved_arguments(directory.parent)
        assert (settings.config, settings.dmc, settings.iteration) == (TINY, None, 0)
        assert settings.args["params_dtype"] == "float32"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("add_bias_linear", True),
        ("qk_layernorm", True),
        ("add_qkv_bias", True),
        ("num_experts", 8),
        ("position_embedding_type", "learned_absolute"),
        ("rotary_percent", 0.5),
        ("rotary_interleaved", True),
        ("window_size", (128, 0)),
        ("multi_latent_attention", True),
        ("softmax_type", "learnable"),
    ],
)
def test_another_model_is_refused_by_the_argument_that_makes_it_one(name, value):
    arguments = megatron_arguments(TINY) | {name: value}
    with pytest.raises(ValueError, match=name):
        config_from_arguments(arguments, 384, "it")


def test_missing_and_contradicting_arguments():
    arguments = megatron_arguments(TINY)
    with pytest.raises(ValueError, match="hidden_size"):
        config_from_arguments({**arguments, "hidden_size": None}, 384, "it")
    with pytest.raises(ValueError, match="exceeds the 200 rows"):
        config_from_arguments(arguments, 200, "it")
    assert config_from_arguments({**arguments, "vocab_size": None}, 384, "it").vocab_size == 384


def test_the_name_of_the_epsilon_up_to_core_0_18():
    arguments = megatron_arguments(TINY)
    arguments["norm_epsilon"] = arguments.pop("layernorm_epsilon")
    assert config_from_arguments(arguments, 384, "it") == TINY


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.5},
        {"rope_scaling": RopeScaling("linear", 1.5)},
    ],
)
def test_what_megatron_cannot_express_is_refused(change):
    with pytest.raises(ValueError, match=r"rope|rotary"):
        megatron_arguments(dataclasses.replace(VARIANTS["gqa"], **change))


def test_dmc_settings_of_another_schema_or_with_gaps():
    stored = dmc_arguments(DMCConfig())
    with pytest.raises(ValueError, match="schema_version"):
        dmc_from_arguments({**stored, "dmc_schema_version": 99}, "it")
    with pytest.raises(ValueError, match="window_size"):
        dmc_from_arguments({name: value for name, value in stored.items() if name != "dmc_window_size"}, "it")
    assert dmc_from_arguments({"dmc_cr": 8}, "it") is None


def test_dmc_settings_of_version_1_are_those_of_dmc():
    stored = dmc_arguments(DMCConfig(window_size=12))
    version_1 = {name: value for name, value in stored.items() if name.removeprefix("dmc_") not in SINCE_2}
    version_1["dmc_schema_version"] = 1
    assert dmc_from_arguments(version_1, "it") == DMCConfig(window_size=12)
    with pytest.raises(ValueError, match="lack temperature"):
        dmc_from_arguments({name: value for name, value in version_1.items() if name != "dmc_temperature"}, "it")


def test_saved_arguments_must_be_a_namespace():
    with pytest.raises(ValueError, match="no saved arguments"):
        namespace_dict({"a": 1}, "it")
    record = Record("argparse.Namespace")
    record.state = {"backend": Record("megatron.core.transformer.enums.AttnBackend", (5,))}
    assert namespace_dict(record, "it") == {"backend": 5}

"""Flags come from the settings, once."""

import argparse
import dataclasses

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.models.config import ModelConfig, RopeScaling
from megatron_dmc.training.arguments import (
    add_dmc_arguments,
    check_shape,
    dmc_config_from_args,
    llama_flags,
    with_defaults,
)

LLAMA = ModelConfig(
    hidden_size=64,
    num_layers=2,
    num_attention_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_hidden_size=128,
    vocab_size=100,
    max_position_embeddings=64,
)


def parse(*argv: str) -> DMCConfig:
    return dmc_config_from_args(add_dmc_arguments(argparse.ArgumentParser()).parse_args(argv))


def test_every_setting_has_a_flag_with_its_default():
    assert parse() == DMCConfig()


def test_flags_set_their_settings():
    assert parse("--dmc-stage", "zero_out", "--dmc-window-size", "12", "--dmc-stop-at-cr", "3") == DMCConfig(
        stage="zero_out", window_size=12, stop_at_cr=3.0
    )


def test_every_flag_has_help_with_its_source():
    help_text = " ".join(add_dmc_arguments(argparse.ArgumentParser()).format_help().split())
    for field in dataclasses.fields(DMCConfig):
        assert field.metadata["help"].split(";")[0][:40] in help_text
    assert help_text.count("source:") == len(dataclasses.fields(DMCConfig))


@pytest.mark.parametrize(
    ("flag", "value"), [("--dmc-target-cr", "0.5"), ("--dmc-window-size", "-1"), ("--dmc-temperature", "0")]
)
def test_a_value_out_of_range_names_itself(flag, value):
    with pytest.raises(ValueError, match=flag[2:].replace("-", "_")):
        parse(flag, value)


def test_defaults_yield_to_flags_that_are_given():
    assert with_defaults(["--lr", "1"], {"--lr": "2", "--swiglu": None}, {"--seed": "3"}) == [
        "--swiglu",
        "--seed",
        "3",
        "--lr",
        "1",
    ]


def test_shape_flags_of_a_scaled_model():
    flags = llama_flags(dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0), rope_theta=5e5))
    assert flags["--rope-scaling-factor"] == "8.0"
    assert flags["--rotary-base"] == "500000"
    assert "--untie-embeddings-and-output-weights" in flags


def test_a_rope_that_megatron_cannot_express_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        llama_flags(dataclasses.replace(LLAMA, rope_theta=10000.5))


def test_a_flag_that_contradicts_the_checkpoint_is_refused():
    check_shape(["--num-layers", "2"], llama_flags(LLAMA))
    with pytest.raises(ValueError, match="--num-layers 3: the base checkpoint has 2"):
        check_shape(["--num-layers", "3"], llama_flags(LLAMA))

"""Flags of a model come from the table of Megatron's settings, and contradictions to the checkpoint are refused."""

import argparse
import dataclasses

import pytest

from megatron_dmc.models.config import ModelConfig
from megatron_dmc.ops.rope_scaling import RopeScaling
from megatron_dmc.training.model_flags import add_model_arguments, check_flags, fixed_flags, model_flags

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
SCALED = dataclasses.replace(LLAMA, rope_scaling=RopeScaling("llama3", 8.0), rope_theta=5e5)


def test_flags_of_a_scaled_model():
    flags = model_flags(dataclasses.replace(SCALED, rope_scaling=RopeScaling("llama3", 32.0)))
    assert flags["--rope-scaling-factor"] == "32.0"
    assert flags["--rotary-base"] == "500000"
    assert {"--use-rope-scaling", "--untie-embeddings-and-output-weights", "--swiglu"} <= flags.keys()
    assert "--dmc-rope-low-freq-factor" not in flags


def test_numbers_that_megatron_has_no_flag_for_have_ours():
    scaling = RopeScaling("llama3", 8.0, 2.0, 5.0, 4096)
    flags = model_flags(dataclasses.replace(SCALED, rope_scaling=scaling))
    own = {flag: value for flag, value in flags.items() if flag.startswith("--dmc-")}
    parser = argparse.ArgumentParser()
    add_model_arguments(parser)
    args = parser.parse_args([part for pair in own.items() for part in pair])
    numbers = (args.dmc_rope_low_freq_factor, args.dmc_rope_high_freq_factor, args.dmc_rope_original_positions)
    assert numbers == (2.0, 5.0, 4096)


def test_every_model_is_without_dropout_and_biases():
    assert fixed_flags() == {
        "--normalization": "RMSNorm",
        "--swiglu": None,
        "--disable-bias-linear": None,
        "--position-embedding-type": "rope",
        "--attention-dropout": "0.0",
        "--hidden-dropout": "0.0",
    }


def test_a_rope_that_megatron_cannot_express_is_refused():
    with pytest.raises(ValueError, match="whole number"):
        model_flags(dataclasses.replace(LLAMA, rope_theta=10000.5))


def test_flags_that_agree_with_the_checkpoint_may_be_given():
    check_flags(["--num-layers", "2", "--norm-epsilon=1e-5", "--group-query-attention", "--lr", "1"], LLAMA)


@pytest.mark.parametrize(
    ("argv", "stated"),
    [
        (["--num-layers", "3"], "--num-layers 3: the base checkpoint has 2"),
        (["--num-layers=3"], "--num-layers 3: the base checkpoint has 2"),
        (["--qk-layernorm"], "--qk-layernorm: the base checkpoint has False"),
        (["--use-rope-scaling"], "--use-rope-scaling: the base checkpoint has False"),
        (["--dmc-model-family", "other"], "--dmc-model-family other: the base checkpoint has llama"),
        (["--hidden-size", "wide"], "--hidden-size wide: the base checkpoint has 64"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_refused(argv, stated):
    with pytest.raises(ValueError, match=stated):
        check_flags(argv, LLAMA)

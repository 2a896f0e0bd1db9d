"""Combinations that compressing attention cannot serve fail when the model is built, and say what to change."""

import pytest

from megatron_dmc.models.megatron import ALL_SETTINGS
from megatron_dmc.training.model import requirements
from tests.layouts.cases import WHOLE_SEGMENT
from tests.layouts.refusals import missing_settings, refusals

BY_FLAG = {
    "--attention-backend local": "it would replace compressing attention",
    "--window-size 16,0": "window_size=(16, 0)",
    "--multi-latent-attention": "--multi-latent-attention",
    "--mtp-num-layers 1": "mtp_num_layers=1",
    "--num-experts 2": "num_moe_experts=2",
    "--use-megatron-fsdp": "--use-megatron-fsdp",
    "--use-torch-fsdp2": "--use-torch-fsdp2",
    "--fp8-format hybrid": "fp8='hybrid'",
    "--fp4-format e2m1": "--fp4-format",
    "--cuda-graph-impl local": "cuda_graph_impl='local'",
    "--attention-output-gate": "attention_output_gate",
    "--softmax-type learnable": "softmax_type='learnable'",
    "--rotary-percent 0.5": "rotary_percent=0.5",
    "--rotary-interleaved": "rotary_interleaved",
    "--position-embedding-type none": "position_embedding_type='none'",
    "--no-rope-freq 2": "no_rope_freq",
    "--hybrid-context-parallel": "--hybrid-context-parallel",
    "--kv-channels 17": "kv_channels=17",
    "--kv-channels 8": "kv_channels=8",
    "--attention-dropout 0.1": "attention_dropout=0.1",
    "--normalization LayerNorm": "normalization='LayerNorm'",
    "--qk-clip": "--qk-clip",
    "--log-max-attention-logit": "--log-max-attention-logit",
    "--freeze-all-layers": "--freeze-all-layers",
    "--sft": "--sft",
    "--spec local": "--spec",
    "--reset-attention-mask": "--reset-attention-mask",
    "--reset-position-ids": "--reset-position-ids",
}
"""Flags, and what the answer must name."""

BY_SETTING = {
    "fp8_dot_product_attention": True,
    "fp8_multi_head_attention": True,
    "fused_single_qkv_rope": True,
    "softmax_scale": 0.5,
    "use_mup": True,
    "experimental_attention_variant": "dsa",
    "heterogeneous_block_specs": True,
    "use_kitchen": True,
}
"""Settings that no flag of this Megatron sets."""


@pytest.fixture(scope="module")
def answers(laboratory):
    usual = laboratory.arguments(WHOLE_SEGMENT, train_iters=1)
    commands = {flags: ([*usual, *flags.split()], {}) for flags in ("", *BY_FLAG)}
    commands |= {name: (usual, {name: value}) for name, value in BY_SETTING.items()}
    answers = laboratory.run(refusals, 1, list(commands.values()))[0]
    return dict(zip(commands, answers, strict=True))


def test_layout_allowed(answers):
    assert answers[""] is None


@pytest.mark.parametrize("flags", BY_FLAG)
def test_layout_refused_flag(answers, flags):
    assert BY_FLAG[flags] in (answers[flags] or "accepted")


@pytest.mark.parametrize("name", BY_SETTING)
def test_layout_refused_setting(answers, name):
    assert f"{name}={BY_SETTING[name]!r}" in (answers[name] or "accepted")


def test_layout_refused_more_ranks_than_heads(laboratory):
    argv = laboratory.arguments(WHOLE_SEGMENT, ("--tensor-model-parallel-size", "8"), train_iters=1)
    (answer,) = laboratory.run(refusals, 1, [(argv, {})], world_size=8)[0]
    assert "tensor_model_parallel_size=8 with 4 KV heads" in answer


def test_layout_refusals_name_settings_of_this_megatron(laboratory):
    used = [setting.attribute for setting in ALL_SETTINGS if setting.remedy] + list(requirements.OFF)
    used += ["attention_backend", "cuda_graph_impl", "num_query_groups", "tensor_model_parallel_size", "kv_channels"]
    used += ["defer_embedding_wgrad_compute", "fine_grained_activation_offloading"]
    assert laboratory.run(missing_settings, 1, used)[0] == []

"""Rotary embedding against rotations of complex numbers, and the fading of the borrowed channel."""

from __future__ import annotations

import pytest
import torch

from megatron_dmc.ops.rope import (
    RopeScaling,
    apply_rope,
    cos_sin,
    faded_rotation,
    inverse_frequencies,
    rotate,
    without_last_channel,
)


def test_rotates_pairs_of_channels() -> None:
    x = torch.randn(30, 2, 3, 16)
    cos, sin = cos_sin(torch.arange(30), inverse_frequencies(16, 10000.0))
    angles = torch.arange(30)[:, None].double() * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    turned = torch.complex(x[..., :8].double(), x[..., 8:].double()) * torch.exp(1j * angles)[:, None, None]
    found = apply_rope(x, cos[:, None, None], sin[:, None, None])
    torch.testing.assert_close(found.double(), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("neuron_scale", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_faded_rotation_scales_the_last_channel_before_and_after(neuron_scale: float, dtype: torch.dtype) -> None:
    x = torch.randn(30, 2, 3, 16).to(dtype)
    cos, sin = cos_sin(torch.arange(30), inverse_frequencies(16, 10000.0))
    scale = torch.ones(16)
    scale[-1] = neuron_scale
    expected = apply_rope(x.float() * scale, cos[:, None, None], sin[:, None, None]) * scale
    found = rotate(x, faded_rotation(cos, sin, neuron_scale), dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-6)
    if neuron_scale == 0:
        assert torch.equal(found[..., -1], torch.zeros_like(found[..., -1]))


def test_inverse_is_the_transpose() -> None:
    x, y = torch.randn(2, 30, 1, 2, 16, dtype=torch.float64)
    angles = cos_sin(torch.arange(30), inverse_frequencies(16, 500.0))
    rotation = faded_rotation(*(t.double() for t in angles), 0.3)
    forth, back = rotate(x, rotation, x.dtype), rotate(y, rotation, y.dtype, inverse=True)
    torch.testing.assert_close((forth * y).sum(), (x * back).sum())


@pytest.mark.parametrize(
    ("scaling", "parameters"),
    [
        (None, None),
        (RopeScaling("linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_frequencies_are_those_of_transformers(scaling: RopeScaling | None, parameters: dict | None) -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 500000.0, **(parameters or {"rope_type": "default"})},
    )
    expected = LlamaRotaryEmbedding(config).inv_freq
    torch.testing.assert_close(inverse_frequencies(128, 500000.0, scaling), expected, rtol=2e-7, atol=0)


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="head_dim=15"):
        inverse_frequencies(15, 10000.0)
    with pytest.raises(ValueError, match="rope_type='yarn': must be one of default, linear, llama3"):
        RopeScaling("yarn", 2.0)
    with pytest.raises(ValueError, match="factor=0"):
        RopeScaling("linear", 0)
    with pytest.raises(ValueError, match="high_freq_factor=1.0: must be above low_freq_factor=1.0"):
        RopeScaling("llama3", 8.0, high_freq_factor=1.0)


def test_without_last_channel_leaves_the_rest() -> None:
    x = torch.randn(3, 4)
    found = without_last_channel(x)
    assert torch.equal(found[:, :3], x[:, :3])
    assert not found[:, 3].any()

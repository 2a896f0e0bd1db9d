"""Entries in 8 bits: all at once against one at a time, error bounds, and entries that a careless scale ruins."""

import pytest
import torch

from megatron_dmc.ops.kv_quantization import KV_FORMATS, dequantise, find_kv_format, format_of, quantise, reference

STORED = [kv_format for kv_format in KV_FORMATS.values() if kv_format.dtype is not None]
STEP = {"int8": 0.5 / 127, "fp8": 2**-4}
"""Largest error: half a step of int8, of the entry's largest magnitude; half a step of 3 bits, of each channel."""


def random_entries(head_dim, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    magnitudes = torch.logspace(-6, 6, 13)
    return (torch.randn(13, head_dim, generator=generator) * magnitudes.unsqueeze(-1)).to(dtype)


@pytest.mark.parametrize("kv_format", STORED, ids=lambda kv_format: kv_format.name)
@pytest.mark.parametrize("head_dim", [1, 64, 80])
def test_equals_one_entry_at_a_time(kv_format, head_dim):
    x_ED = random_entries(head_dim)
    stored_ED, scale_E = quantise(x_ED, kv_format)
    assert stored_ED.dtype == kv_format.dtype
    for x_D, stored_D, scale in zip(x_ED, stored_ED, scale_E, strict=True):
        expected_D, expected_scale = reference.quantise(x_D, kv_format)
        assert scale.item() == pytest.approx(expected_scale, rel=1e-6)
        # Divisions in float32 and float64 may fall on two sides of a half.
        assert ((stored_D.float() - expected_D.float()).abs() <= STEP[kv_format.name] * kv_format.largest * 2).all()
        assert (stored_D.float() == expected_D.float()).float().mean() > 0.9
        found_D = dequantise(stored_D, scale, torch.float32)
        torch.testing.assert_close(found_D, reference.dequantise(stored_D, scale.item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_format", STORED, ids=lambda kv_format: kv_format.name)
def test_error_is_within_half_a_step(kv_format, dtype):
    x_ED = random_entries(64, dtype)
    found_ED = dequantise(*quantise(x_ED, kv_format), torch.float32)
    error_ED = (found_ED - x_ED.float()).abs()
    largest_E1 = x_ED.float().abs().amax(-1, keepdim=True)
    # Below the normal numbers of fp8 the step is fixed: 2**-9 of a scale, half of it at most.
    relative_to = largest_E1 if kv_format.name == "int8" else x_ED.float().abs() + largest_E1 * 2**-6 / 448
    assert (error_ED <= 1.001 * STEP[kv_format.name] * relative_to).all()


@pytest.mark.parametrize("kv_format", STORED, ids=lambda kv_format: kv_format.name)
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-31, 1e-30, 3e38])
def test_entries_of_zeros_and_of_extreme_numbers_stay_numbers(kv_format, value):
    x_ED = torch.full((1, 8), value)
    x_ED[0, 0] = -value
    stored, scale = quantise(x_ED, kv_format)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    torch.testing.assert_close(dequantise(stored, scale, torch.float32), x_ED, atol=1e-30, rtol=1e-6)


@pytest.mark.parametrize("kv_format", STORED, ids=lambda kv_format: kv_format.name)
def test_the_largest_channel_is_kept(kv_format):
    x_ED = random_entries(64)
    found_ED = dequantise(*quantise(x_ED, kv_format), torch.float32)
    largest_E1 = x_ED.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(found_ED.gather(1, largest_E1), x_ED.gather(1, largest_E1), rtol=1e-6, atol=0)


def test_bytes_of_a_block():
    auto, fp8, int8 = KV_FORMATS["auto"], KV_FORMATS["fp8"], KV_FORMATS["int8"]
    assert auto.block_bytes(32, 128, torch.bfloat16) == 2 * 32 * 128 * 2
    assert auto.open_entry_bytes(128, torch.bfloat16) == 0
    for kv_format in (fp8, int8):
        assert kv_format.block_bytes(32, 128, torch.bfloat16) == 2 * 32 * (128 + 4)
        assert kv_format.open_entry_bytes(128, torch.bfloat16) == 2 * 128 * 2 + 4


def test_formats_are_found_by_name_and_by_dtype():
    assert find_kv_format("fp8").dtype == torch.float8_e4m3fn
    assert format_of(torch.int8).name == "int8"
    assert format_of(torch.bfloat16).name == "auto"
    with pytest.raises(ValueError, match=r"kv_dtype='fp4': must be one of auto, fp8, int8"):
        find_kv_format("fp4")

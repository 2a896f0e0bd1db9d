"""Packed matrices against plain ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_dmc.inference.decoder import linear
from megatron_dmc.inference.decoder.linear import Linear


@pytest.mark.parametrize("shape", [(96,), (1, 96), (8, 96), (2, 5, 96), (300, 96), (0, 96)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_equals_the_plain_product(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(70, 96, generator=generator) / 10).to(dtype)
    x = torch.randn(*shape, generator=generator).to(dtype)
    bias = torch.randn(70, generator=generator).to(dtype) if has_bias else None
    found = Linear(weight, bias)(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found, F.linear(x, weight, bias), atol=tolerance, rtol=tolerance)


def test_takes_vectors_that_are_not_contiguous() -> None:
    weight, x = torch.randn(70, 96), torch.randn(96, 5).T
    torch.testing.assert_close(Linear(weight)(x), F.linear(x, weight), atol=1e-4, rtol=1e-4)


def test_without_onednn_the_plain_product_is_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight, x = torch.randn(70, 96), torch.randn(3, 96)
    linear._onednn_packs.cache_clear()
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(linear.torch.backends.mkldnn, "is_available", lambda: False)
        assert torch.equal(Linear(weight)(x), F.linear(x, weight))
    linear._onednn_packs.cache_clear()
    assert "plain matrices, not packed ones, because this torch comes without oneDNN's" in caplog.text

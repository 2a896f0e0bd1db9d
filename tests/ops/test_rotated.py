"""Rotated queries and keys: borrowed channels fade before and after RoPE, and gradients follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.borrowed import EVERY_HEAD, FIRST_QUERY, NO_HEAD, Borrowed
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.rope import apply_rope, inverse_frequencies
from megatron_dmc.ops.rotated import rotated_keys, rotated_queries
from tests.ops.comparison import assert_same

N, G, D = 6, 3, 8
LENT = {EVERY_HEAD: ([0, 1, 2, 3, 4, 5], [0, 1, 2]), FIRST_QUERY: ([0, 2, 4], []), NO_HEAD: ([], [])}
"""Query heads and key heads."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("neuron_scale", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("borrowed", LENT)
def test_lent_channels_fade_alone(borrowed: Borrowed, neuron_scale: float, dtype: torch.dtype) -> None:
    geometry = Geometry(7, 2, inverse_frequencies(D, 10000.0))

    def found(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return (
            rotated_queries(q, G, geometry, neuron_scale, borrowed),
            rotated_keys(k, geometry, neuron_scale, borrowed),
        )

    def expected(*heads: Tensor) -> tuple[Tensor, ...]:
        cos, sin = (x.to(heads[0].dtype)[:, None, None] for x in geometry.cos_sin_S)
        results = []
        for x, lent in zip(heads, LENT[borrowed], strict=True):
            fade = torch.ones(x.shape[2:], dtype=x.dtype)
            fade[lent, -1] = neuron_scale
            results.append(fade * apply_rope(fade * x, cos, sin))
        return tuple(results)

    assert_same(found, expected, [torch.randn(7, 2, heads, D).to(dtype) for heads in (N, G)])

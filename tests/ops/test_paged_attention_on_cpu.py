"""Decode attention on a CPU, in place and padded, against the plain form. Blocks that nobody reads are NaN throughout.

Legend: L layers, B sequences, G KV heads, D head dim, P entries per block, M blocks per head cache.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.paged_attention import on_cpu, reference
from megatron_dmc.ops.paged_attention.in_place import InPlace, plan_in_place
from megatron_dmc.ops.paged_attention.padded import Padded, plan_padded

PLANS = {"in place": plan_in_place, "padded": plan_padded}
LAYERS, BATCH = 3, 2
LEFT_OVER = 1e4
"""What stands in blocks behind the last entry: far from every key and value, but a number."""


class Caches(NamedTuple):
    """The head caches of some layers."""

    k_blocks: Tensor
    v_blocks: Tensor
    table_LBGM: Tensor
    length_LBG: Tensor
    held_LBG: Tensor

    def with_spare_blocks(self) -> Caches:
        """The same, but a head cache whose blocks are full holds the next one already."""
        spare_LBG = self.length_LBG == self.held_LBG * self.k_blocks.shape[1]
        return self._replace(held_LBG=self.held_LBG + spare_LBG.int())


def random_caches(num_kv_heads: int, head_dim: int, block_size: int, longest: int, *, spread: float = 1.5) -> Caches:
    """Head caches of 1 to ``longest`` entries; all that long, a layer's would fill 1 / ``spread`` of its part."""
    generator = torch.Generator().manual_seed(3)
    heads = (LAYERS, BATCH, num_kv_heads)
    length_LBG = torch.randint(1, longest + 1, heads, generator=generator, dtype=torch.int32)
    length_LBG[0, 0, 0], length_LBG[0, -1, -1], length_LBG[1, 0, 0] = longest, 1, block_size
    width = longest // block_size + 1
    per_layer = int(BATCH * num_kv_heads * width * spread) + 1
    order_LX = torch.stack([torch.randperm(per_layer, generator=generator) for _ in range(LAYERS)])
    block_LX = order_LX + per_layer * torch.arange(LAYERS).unsqueeze(-1)
    table_LBGM = block_LX[:, : BATCH * num_kv_heads * width].reshape(*heads, width).int()
    held_LBG = (length_LBG + block_size - 1) // block_size
    k_blocks = torch.full((LAYERS * per_layer, block_size, head_dim), torch.nan)
    v_blocks = k_blocks.clone()
    for place in torch.cartesian_prod(*(torch.arange(size) for size in heads)).tolist():
        length = int(length_LBG[tuple(place)])
        for column in range(width):
            block = table_LBGM[(*place, column)]
            filled = max(0, min(length - column * block_size, block_size))
            for pool in (k_blocks, v_blocks):
                pool[block] = LEFT_OVER if column <= length // block_size else torch.nan
                pool[block, :filled] = torch.randn(filled, head_dim, generator=generator)
    return Caches(k_blocks, v_blocks, table_LBGM, length_LBG, held_LBG)


def check(form: str, caches: Caches, group: int, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> None:
    """Every layer equals the reference."""
    k_blocks, v_blocks = caches.k_blocks.to(dtype), caches.v_blocks.to(dtype)
    block_size, num_heads = k_blocks.shape[1], group * caches.length_LBG.shape[2]
    generator = torch.Generator().manual_seed(4)
    plans = PLANS[form](caches.table_LBGM, caches.held_LBG, block_size)
    assert len(plans) == len(caches.length_LBG)
    for plan, table_BGM, length_BG in zip(plans, caches.table_LBGM, caches.length_LBG, strict=True):
        q_BND = torch.randn(len(length_BG), num_heads, k_blocks.shape[2], generator=generator).to(dtype)
        expected = reference.paged_attention(q_BND, k_blocks, v_blocks, table_BGM, length_BG)
        found = plan.attend(q_BND, k_blocks, v_blocks, length_BG)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("form", PLANS)
def test_equals_reference(form: str, group: int, head_dim: int, block_size: int) -> None:
    check(form, random_caches(2, head_dim, block_size, 150).with_spare_blocks(), group)


@pytest.mark.parametrize("longest", [1, 2, 31, 32, 33, 1500])
@pytest.mark.parametrize("form", PLANS)
def test_every_length(form: str, longest: int) -> None:
    check(form, random_caches(1, 64, 32, longest), group=2)


@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_in_place_wherever_the_blocks_lie(spread: float) -> None:
    """With holes of about half, or so far apart that they are copied."""
    caches = random_caches(3, 64, 16, 100, spread=spread)
    check("in place", caches, group=2)
    plans = plan_in_place(caches.table_LBGM, caches.held_LBG, 16)
    assert any(isinstance(plan.where, slice) for plan in plans) == (spread == 1.0)


def test_in_place_with_blocks_that_several_hold() -> None:
    """Both sequences of one layer begin with the same blocks."""
    caches = random_caches(2, 64, 16, 150, spread=1.0)
    shared = 3
    caches.length_LBG[1].clamp_(min=16 * shared + 1)
    held_LBG = (caches.length_LBG + 15) // 16
    for pool in (caches.k_blocks, caches.v_blocks):
        pool.nan_to_num_(0.5)
    caches.table_LBGM[1, 1, :, :shared] = caches.table_LBGM[1, 0, :, :shared]
    caches = caches._replace(held_LBG=held_LBG)
    check("in place", caches, group=3)
    plans = plan_in_place(caches.table_LBGM, caches.held_LBG, 16)
    assert [isinstance(plan.where, slice) for plan in plans] == [True, False, True]


@pytest.mark.parametrize("form", PLANS)
def test_bfloat16_rounds_only_at_the_end(form: str) -> None:
    check(form, random_caches(2, 64, 32, 100), 4, torch.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize(
    ("lengths", "form"),
    [([100] * 3, Padded), ([9000] * 3, InPlace), ([100, 100, 9000], InPlace), ([100, 100, 300], Padded)],
)
def test_short_ones_are_padded_long_and_uneven_ones_read_in_place(lengths: list[int], form: type) -> None:
    held_LBG = (torch.tensor([[lengths]], dtype=torch.int32) + 31) // 32
    table_LBGM = torch.arange(3 * int(held_LBG.max()), dtype=torch.int32).view(1, 1, 3, -1)
    (plan,) = on_cpu.plan_decode(table_LBGM, held_LBG, torch.zeros(1, 32, 64))
    assert type(plan) is form

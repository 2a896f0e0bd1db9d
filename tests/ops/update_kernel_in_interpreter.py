"""Tests of the kernel of a decoding step, run by ``test_update_kernel.py`` in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from megatron_dmc.ops.cache_update import FreeBlocks, kernels, one_step
from tests.ops.decode_steps import check_trace, empty_caches, free_list, random_tokens
from tests.ops.interpreter import choose_kernels
from tests.ops.test_update_caches import CASES, SEGMENT, WINDOW, Case


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Choose the kernel although the tensors are on a CPU."""
    choose_kernels(monkeypatch)


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_lists(name: str) -> None:
    check_trace(CASES[name])


@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("merging", [SEGMENT, SEGMENT._replace(window_size=12)], ids=["segment", "window"])
def test_shapes(merging: object, head_dim: int, group: int) -> None:
    check_trace(Case(merging, group=group, head_dim=head_dim, num_steps=3))


@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_block_sizes(block_size: int) -> None:
    check_trace(Case(None, num_steps=block_size + 2, block_size=block_size, num_kv_heads=1, rows=[1]))


@pytest.mark.parametrize("name", ["whole segments", "window", "int8", "fp8", "dense, faded"])
def test_memory_equals_that_of_torch_operations(name: str) -> None:
    """Sums, ring, scales and open entries too; blocks lie elsewhere where several are taken at once."""
    case = dataclasses.replace(CASES[name], has_free_list=False)
    found, expected = empty_caches(case), empty_caches(case)
    rows_B = torch.tensor(case.rows)
    settings = {"merging": case.merging, "neuron_scale": case.neuron_scale}
    for step in range(case.num_steps):
        kernels.update_caches(random_tokens(case, step), found, rows_B, **settings)
        one_step.update_caches(random_tokens(case, step), expected, rows_B, **settings)
    tensors = [*found.kv, *found[1:]], [*expected.kv, *expected[1:]]
    for x, y in zip(*tensors, strict=True):
        if x is not None:
            atol = 1.0 if x.dtype == torch.int8 else 1e-5
            rtol = 2**-3 if x.dtype == torch.float8_e4m3fn else 0
            torch.testing.assert_close(x.float(), y.float(), atol=atol, rtol=rtol, equal_nan=True)


def test_row_minus_one_is_no_sequence() -> None:
    case = Case(SEGMENT, rows=[2, -1])
    caches, free = empty_caches(case), free_list(empty_caches(case))
    before = copy.deepcopy(caches)
    kernels.update_caches(random_tokens(case, 0), caches, torch.tensor(case.rows), merging=SEGMENT, free=free)
    assert caches.cache_seqlens_AG.tolist() == [[0] * 2, [0] * 2, [1] * 2, [0] * 2]
    for rows in (slice(0, 2), slice(3, 4)):
        torch.testing.assert_close(caches.state[rows], before.state[rows], equal_nan=True)
    assert int(free.num_free) == len(caches.kv.k_blocks) - 2


def test_without_a_free_block_a_head_cache_stays_as_it_is() -> None:
    case = Case(WINDOW)
    caches = empty_caches(case)
    free = FreeBlocks(free_list(caches).block_F, torch.tensor([2], dtype=torch.int32))
    kernels.update_caches(random_tokens(case, 0), caches, torch.tensor(case.rows), merging=WINDOW, free=free)
    assert int(free.num_free) == -2
    assert int(caches.cache_seqlens_AG.sum()) == 2
    assert int(caches.kv.k_blocks.isfinite().any(-1).sum()) == 2
    assert int((caches.block_table_AGM < 2**30).sum()) == 2

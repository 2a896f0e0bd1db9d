"""Tests of split attention, run by ``test_attention_kernels.py`` in a process with TRITON_INTERPRET=1.

Legend: B sequences, N query heads, G KV heads, R = N / G, D head dim, E entries.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops.attention_weights import decode_weights
from megatron_dmc.ops.paged_attention import paged_attention, reference, split_attention, work_list
from tests.ops.interpreter import choose_kernels
from tests.ops.random_caches import random_cache
from tests.tolerances import OUTPUT, output_error

GROUPS = (1, 3, 4, 8)
HEAD_DIMS = (64, 80, 128)
BLOCK_SIZES = (1, 16, 24, 32, 64)
LENGTHS = [[0, 1], [65, 130], [7, 0]]
"""Empty, shorter than a block, within the first chunk of 64, of several chunks, none of them whole."""


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernels(monkeypatch)


def queries(cache: tuple, group: int, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    batch, num_kv_heads = cache[2].shape
    generator = torch.Generator().manual_seed(4)
    # A slice of projections, as a model has them: heads are neighbours, sequences are not.
    wide = torch.randn(batch, 2 * num_kv_heads * group, head_dim, generator=generator).to(dtype)
    return wide[:, : num_kv_heads * group]


def assert_equals_reference(q_BND: Tensor, cache: tuple, chunk_size: int = 64) -> None:
    """Output, log-sum-exp and weights of every head cache, the empty ones too."""
    work = work_list(cache[2], chunk_size)
    found = split_attention.attend(q_BND, *cache, work=work, keep_weights=True)
    expected = reference.attend(q_BND, *cache)
    allowed = OUTPUT[q_BND.dtype]
    filled_BN = torch.isfinite(expected[1])
    assert torch.equal(found[1][~filled_BN], expected[1][~filled_BN])
    assert output_error(found[1][filled_BN], expected[1][filled_BN]) <= allowed
    assert output_error(found[0], expected[0]) <= allowed
    assert output_error(found[2], expected[2]) <= allowed
    assert found[0].dtype == q_BND.dtype


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_groups_and_head_dims(group: int, head_dim: int, kv_dtype: str) -> None:
    cache = random_cache(LENGTHS, head_dim, 16, kv_dtype=kv_dtype)
    assert_equals_reference(queries(cache, group, head_dim), cache)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(group: int, block_size: int, kv_dtype: str) -> None:
    cache = random_cache(LENGTHS, 16, block_size, kv_dtype=kv_dtype)
    assert_equals_reference(queries(cache, group, 16), cache)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(group: int, dtype: torch.dtype, kv_dtype: str) -> None:
    cache = random_cache(LENGTHS, 64, 16, dtype=dtype, kv_dtype=kv_dtype)
    q_BND = queries(cache, group, 64, dtype)
    found = split_attention.attend(q_BND, *cache, work=work_list(cache[2], 64))
    expected = reference.attend(q_BND, *cache)
    assert output_error(found[0], expected[0]) <= OUTPUT[torch.bfloat16]
    assert found[0].dtype == dtype


@pytest.mark.parametrize("group", [1, 8])
def test_very_long_beside_very_short(group: int) -> None:
    """Twenty chunks beside one of one entry: more than the reduction takes at a time."""
    cache = random_cache([[1, 1280], [3, 2]], 16, 16)
    assert_equals_reference(queries(cache, group, 16), cache)


@pytest.mark.parametrize("chunk_size", [16, 64, 256])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 65, 256, 257])
def test_borders_of_chunks(length: int, chunk_size: int) -> None:
    cache = random_cache([[length]], 16, 16)
    assert_equals_reference(queries(cache, 1, 16), cache, chunk_size)


@pytest.mark.parametrize("group", [1, 4])
def test_scores_far_from_zero(group: int) -> None:
    """Chunks whose maxima lie 1e4 apart, which exponentials without subtraction do not survive."""
    kv, table, lengths = random_cache([[100, 70]], 16, 16)
    kv.k_blocks[int(table[0, 0, 0])] *= 1e4
    q_BND = queries((kv, table, lengths), group, 16)
    found = split_attention.attend(q_BND, kv, table, lengths, work=work_list(lengths, 32))
    expected = reference.attend(q_BND, kv, table, lengths)
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("place", [0, 20, 69])
@pytest.mark.parametrize("group", [1, 4])
def test_the_open_entry_may_lie_anywhere(group: int, place: int) -> None:
    """In any chunk, first or last of it; also alone."""
    for length in {70, place + 1}:
        kv, table, lengths = random_cache([[length]], 16, 16, kv_dtype="int8")
        kv.k_blocks[:], kv.k_scale[:] = torch.randint(-127, 128, kv.k_blocks.shape), 0.01
        kv.v_blocks[:], kv.v_scale[:] = torch.randint(-127, 128, kv.v_blocks.shape), 0.01
        block = int(table[0, 0, place // 16])
        kv.k_scale[block, place % 16] = kv.v_scale[block, place % 16] = torch.nan
        kv.open_entry_BG[0, 0] = place
        cache = (kv, table, lengths)
        assert_equals_reference(queries(cache, group, 16), cache, chunk_size=32)


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_rows_of_the_cache(kv_dtype: str) -> None:
    """Sequences in any rows; -1 is none, and gets zeros."""
    cache = random_cache([[5, 70], [9, 1], [33, 2]], 16, 16, kv_dtype=kv_dtype)
    q_BND = queries(cache, 3, 16)
    rows_B = torch.tensor([2, -1, 0])
    found = paged_attention(q_BND[[2, 1, 0]], *cache, rows_B=rows_B)
    expected = reference.paged_attention(q_BND, *cache)
    assert output_error(found[[0, 2]], expected[[2, 0]]) <= OUTPUT[torch.float32]
    assert not found[1].any()


def test_a_work_list_for_one_entry_more_changes_nothing() -> None:
    """It is made before a step, for all layers, when nobody knows yet which heads will append."""
    cache = random_cache([[64, 63], [0, 128]], 16, 16)
    q_BND = queries(cache, 1, 16)
    exact = split_attention.attend(q_BND, *cache, work=work_list(cache[2], 64))
    more = split_attention.attend(q_BND, *cache, work=work_list(torch.stack((cache[2], cache[2] + 1)), 64).of_layer(1))
    assert all(map(torch.equal, exact[:2], more[:2]))


def test_a_sequence_gets_the_same_bits_in_any_company() -> None:
    alone = random_cache([[100, 40]], 16, 16)
    q_BND = queries(alone, 4, 16)
    output = split_attention.attend(q_BND, *alone)[0]
    kv, table, lengths = alone
    crowd = (kv, table.repeat(3, 1, 1), torch.cat((lengths * 0 + 1, lengths, lengths - 7)))
    found = split_attention.attend(q_BND.repeat(3, 1, 1), *crowd)[0]
    assert torch.equal(found[1], output[0])


@pytest.mark.parametrize(("block_e", "group"), itertools.product([16, 128], [1, 4]))
def test_tuning_changes_rounding_alone(block_e: int, group: int) -> None:
    cache = random_cache(LENGTHS, 64, 16)
    q_BND = queries(cache, group, 64)
    sizes = split_attention.tuning(group, 64, 4)._replace(block_e=block_e, programs=7)
    found = split_attention.attend(q_BND, *cache, sizes=sizes)
    expected = reference.attend(q_BND, *cache)
    assert output_error(found[0], expected[0]) <= OUTPUT[torch.float32]


@pytest.mark.parametrize("group", [1, 4])
def test_weights_for_policies_that_evict_by_them(group: int) -> None:
    cache = random_cache([[3, 70], [33, 2]], 16, 16)
    q_BND = queries(cache, group, 16)
    found = decode_weights(q_BND, *cache)
    expected = reference.attend(q_BND, *cache)[2]
    assert output_error(found, expected[..., : found.shape[-1]]) <= OUTPUT[torch.float32]
    assert not expected[..., found.shape[-1] :].any()

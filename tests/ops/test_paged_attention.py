"""Decode attention over block tables that differ per KV head: PyTorch form against the plain one.

Legend: B sequences, N query heads, G KV heads, D head dim, E entries.
"""

import logging

import pytest
import torch

from megatron_dmc.ops import triton_kernels
from megatron_dmc.ops.attention_weights import decode_weights
from megatron_dmc.ops.paged_attention import (
    paged_attention,
    paged_attention_to_chunks,
    read_keys,
    reference,
    work_list,
)
from megatron_dmc.ops.paged_attention.entries import read_values
from tests.ops.random_caches import random_cache


def ragged(batch, num_kv_heads, longest):
    """Lengths from 1 to ``longest``, both among them."""
    lengths = torch.randint(1, longest + 1, (batch, num_kv_heads), generator=torch.Generator().manual_seed(3))
    lengths[0, 0], lengths[-1, -1] = longest, 1
    return lengths.tolist()


def queries(batch, num_query_heads, head_dim, dtype=torch.float32):
    return torch.randn(batch, num_query_heads, head_dim, generator=torch.Generator().manual_seed(4)).to(dtype)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize(("block_size", "longest"), [(1, 5), (4, 1), (16, 63)])
@pytest.mark.parametrize("head_dim", [16, 100])
def test_equals_reference(num_query_heads, num_kv_heads, block_size, longest, head_dim):
    cache = random_cache(ragged(3, num_kv_heads, longest), head_dim, block_size)
    q_BND = queries(3, num_query_heads, head_dim)
    output = paged_attention(q_BND, *cache)
    torch.testing.assert_close(output, reference.paged_attention(q_BND, *cache), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
@pytest.mark.parametrize("open_entries", [True, False])
def test_quantised_entries_equal_reference(kv_dtype, open_entries):
    cache = random_cache(ragged(3, 2, 40), 16, 8, kv_dtype=kv_dtype, open_entries=open_entries)
    q_BND = queries(3, 4, 16)
    output, lse_BN, weights_BGRE = reference.attend(q_BND, *cache)
    torch.testing.assert_close(paged_attention(q_BND, *cache), output, atol=1e-5, rtol=1e-5)
    found_BGRE = decode_weights(q_BND, *cache)
    torch.testing.assert_close(found_BGRE, weights_BGRE[..., : found_BGRE.shape[-1]], atol=1e-5, rtol=1e-5)
    outputs, lses = paged_attention_to_chunks(q_BND, [1, 1, 1], *cache)
    torch.testing.assert_close(outputs.transpose(0, 1), output, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lses.transpose(0, 1), lse_BN, atol=1e-5, rtol=1e-5)


def test_entries_that_only_the_first_queries_see():
    """Each query as if it were the only one, over the entries that it sees; more queries than are scored at once."""
    counts, (kv, table, length_BG) = [150, 1, 20], random_cache(ragged(3, 2, 20), 16, 8)
    q_TND = queries(sum(counts), 4, 16)
    num_queries_BGE = torch.randint(0, 150, (3, 2, 24), dtype=torch.int32, generator=torch.Generator().manual_seed(5))
    num_queries_BGE[:, :, ::3] = torch.iinfo(torch.int32).max
    outputs, lses = paged_attention_to_chunks(q_TND, counts, kv, table, length_BG, num_queries_BGE)
    for place, (row, query) in enumerate((row, query) for row, count in enumerate(counts) for query in range(count)):
        for head in range(4):
            length = int(length_BG[row, head // 2])
            place_11E = torch.arange(length).view(1, 1, -1)
            cache = (kv, table[row : row + 1, head // 2 : head // 2 + 1], place_11E, torch.float32)
            seen_E = num_queries_BGE[row, head // 2, :length] > query
            k_ED, v_ED = (read(*cache)[0, 0][seen_E] for read in (read_keys, read_values))
            scores = k_ED @ q_TND[place, head] / 4
            torch.testing.assert_close(lses[head, place], scores.logsumexp(0), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs[head, place], scores.softmax(0) @ v_ED, atol=1e-5, rtol=1e-5)


def test_open_entries_are_read_as_they_are():
    """A head whose only entry is open attends to nothing else, so its output is that value."""
    kv, table, lengths = random_cache([[1]], 16, 8, kv_dtype="int8")
    output = paged_attention(queries(1, 1, 16), kv, table, lengths)
    assert torch.equal(output[0], kv.v_open[0])


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_sequences_may_lie_in_any_rows(kv_dtype):
    cache = random_cache(ragged(4, 2, 20), 16, 8, kv_dtype=kv_dtype)
    q_BND = queries(4, 4, 16)
    rows_B = torch.tensor([3, 1])
    found = paged_attention(q_BND[rows_B], *cache, rows_B=rows_B)
    torch.testing.assert_close(found, paged_attention(q_BND, *cache)[rows_B])


def test_bfloat16_rounds_only_at_the_end():
    cache = random_cache(ragged(3, 2, 40), 64, 16, dtype=torch.bfloat16)
    q_BND = queries(3, 4, 64, torch.bfloat16)
    output = paged_attention(q_BND, *cache)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, reference.paged_attention(q_BND, *cache), atol=2e-2, rtol=2e-2)


def test_work_list_has_every_chunk_once_and_the_longest_first():
    length_BG = torch.tensor([[0, 17, 16], [40, 1, 16]], dtype=torch.int32)
    work = work_list(length_BG, chunk_size=16)
    assert work.order_H.tolist() == [3, 1, 2, 5, 4, 0]
    assert work.start_H.tolist() == [0, 3, 5, 6, 7, 8, 8]
    assert work.order_H.dtype == work.start_H.dtype == torch.int32
    assert int(work.start_H[-1]) <= work.max_chunks(longest=40)
    of_both = work_list(torch.stack((length_BG, length_BG + 1)), chunk_size=16)
    assert all(map(torch.equal, of_both.of_layer(0)[:2], work[:2]))
    assert of_both.of_layer(1).start_H.tolist() == [0, 3, 5, 7, 9, 10, 11]


def test_more_chunks_than_max_chunks_are_never_planned():
    """Every head cache of a full table, and one entry more than there is."""
    for longest in (1, 15, 16, 17, 255, 256, 257):
        work = work_list(torch.full((3, 2), longest + 1), chunk_size=256)
        assert int(work.start_H[-1]) <= work.max_chunks(longest)


def test_the_choice_is_logged_once_with_its_reason(caplog):
    triton_kernels.load.cache_clear()
    caplog.set_level(logging.INFO, logger=triton_kernels.__name__)
    cache = random_cache([[3]], 16, 8)
    for _ in range(2):
        paged_attention(queries(1, 1, 16), *cache)
    assert [record.getMessage() for record in caplog.records] == [
        "attention over the cache: torch operations, not Triton kernels, because the tensors are on cpu"
    ]

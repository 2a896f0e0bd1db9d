"""One step of decoding in the cache, in torch operations, against lists of entries; and without free blocks."""

import pytest
import torch

from megatron_dmc.ops.cache_update import FreeBlocks, Merging, update_caches
from tests.ops.decode_steps import Case, check_trace, empty_caches, free_list, random_tokens

SEGMENT, WINDOW = Merging(0.5, 0.0, 1e-6, 0), Merging(0.5, 0.25, 0.0078125, 3)
CASES = {
    "dense": Case(merging=None, neuron_scale=1.0),
    "dense, faded": Case(merging=None, neuron_scale=0.3),
    "whole segments": Case(merging=SEGMENT),
    "window": Case(merging=WINDOW),
    "window of one": Case(merging=SEGMENT._replace(window_size=1)),
    "per layer": Case(merging=SEGMENT, per_layer=True),
    "blocks in the table": Case(merging=SEGMENT, has_free_list=False),
    "bfloat16": Case(merging=WINDOW, dtype=torch.bfloat16),
    "int8": Case(merging=SEGMENT, kv_dtype="int8"),
    "fp8": Case(merging=WINDOW, kv_dtype="fp8"),
    "int8 of bfloat16": Case(merging=SEGMENT, kv_dtype="int8", dtype=torch.bfloat16),
    "int8, closed at once": Case(merging=None, kv_dtype="int8", open_entries=False),
    "three queries": Case(merging=SEGMENT, group=3, head_dim=20),
    "one query": Case(merging=SEGMENT, group=1, block_size=1),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_equal_lists(name):
    check_trace(CASES[name])


def test_without_a_free_block_a_head_cache_stays_as_it_is():
    """Two blocks for four heads: two are missing, which the count says; nothing else is written."""
    case = Case(SEGMENT)
    caches = empty_caches(case)
    free = FreeBlocks(free_list(caches).block_F, torch.tensor([2], dtype=torch.int32))
    update_caches(random_tokens(case, 0), caches, torch.tensor(case.rows), merging=case.merging, free=free)
    assert int(free.num_free) == -2
    assert int(caches.cache_seqlens_AG.sum()) == 2
    assert int(caches.kv.k_blocks.isfinite().any(-1).sum()) == 2
    assert int(caches.state.isfinite().any(-1).sum()) == 2
    free.num_free.clamp_(min=0)
    held = caches.block_table_AGM[..., 0][caches.cache_seqlens_AG > 0]
    assert sorted(held.tolist()) == sorted(free.block_F[:2].tolist())


def test_a_sequence_that_begins_anew_in_a_row_takes_nothing_over():
    """Sums, ring and open entry of the former sequence stay in memory; position 0 appends and forgets them."""
    for case in (CASES["whole segments"], CASES["window"], CASES["int8"]):
        caches = empty_caches(case)
        free = free_list(caches)
        rows_B = torch.tensor(case.rows)
        for step in range(3):
            update_caches(random_tokens(case, step), caches, rows_B, merging=case.merging, free=free)
        found = []
        for again in (caches, empty_caches(case)):
            again.cache_seqlens_AG.zero_()
            if again.kv.open_entry_BG is not None:
                again.kv.open_entry_BG.fill_(-1)
            update_caches(random_tokens(case, 0), again, rows_B, merging=case.merging, free=free_list(again))
            found.append(again.state[rows_B])
        torch.testing.assert_close(*found)

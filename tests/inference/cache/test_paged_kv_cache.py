"""The paged cache against lists: random appends, overwrites, prompts and departures."""

import random

import pytest
import torch

from megatron_dmc.inference.cache.block_allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.cache.usage import CacheUsage

L, G, D, P = 2, 3, 4, 4
SHAPE = CacheShape(num_layers=L, num_kv_heads=G, head_dim=D, dtype=torch.float32, window_size=0, block_size=P)


class ListCache:
    """The same cache as a dictionary of lists: (layer, row, head) -> entries, each a pair of lists."""

    def __init__(self):
        self.entries = {}

    def write_prompt(self, layer, rows, k, v, lengths):
        for index, row in enumerate(rows.tolist()):
            for head in range(G):
                length = int(lengths[index, head])
                pairs = zip(k[index, head, :length].tolist(), v[index, head, :length].tolist(), strict=True)
                self.entries[layer, row, head] = list(pairs)

    def write_newest(self, layer, rows, append, k, v):
        for index, row in enumerate(rows.tolist()):
            for head in range(G):
                entries = self.entries.setdefault((layer, row, head), [])
                if not append[index, head]:
                    entries.pop()
                entries.append((k[index, head].tolist(), v[index, head].tolist()))

    def free(self, rows):
        self.entries = {key: value for key, value in self.entries.items() if key[1] not in rows.tolist()}


def entries_of(cache, layer, row, head):
    """What ``cache`` holds for one head, entry by entry through its block table."""
    found = []
    for entry in range(int(cache.cache_seqlens[layer, row, head])):
        block = cache.block_table[layer, row, head, entry // P]
        found.append((cache.k_blocks[block, entry % P].tolist(), cache.v_blocks[block, entry % P].tolist()))
    return found


@pytest.mark.parametrize("num_blocks", [None, 600])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_trace_against_lists(num_blocks, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    cache, lists, running = PagedKVCache(SHAPE, 5, num_blocks=num_blocks), ListCache(), []
    for _ in range(80):
        if cache.num_free_sequences and draw.random() < 0.2:
            rows = cache.add_sequences(draw.randint(1, cache.num_free_sequences))
            longest = draw.randint(1, 11)
            for layer in range(L):
                k, v = torch.randn(2, len(rows), G, longest, D)
                lengths = torch.randint(1, longest + 1, (len(rows), G), dtype=torch.int32)
                cache.write_prompt(layer, rows, k, v, lengths)
                lists.write_prompt(layer, rows, k, v, lengths)
            running += rows.tolist()
        elif running and draw.random() < 0.1:
            rows = torch.tensor(draw.sample(running, draw.randint(1, len(running))))
            cache.free_sequences(rows)
            lists.free(rows)
            running = [row for row in running if row not in rows.tolist()]
        elif running:
            rows = torch.tensor(draw.sample(running, draw.randint(1, len(running))))
            for layer in range(L):
                append = torch.rand(len(rows), G) < 0.6
                k, v = torch.randn(2, len(rows), G, D)
                cache.write_newest(layer, rows, append, k, v)
                lists.write_newest(layer, rows, append, k, v)
        cache.check_integrity()
        for (layer, row, head), entries in lists.entries.items():
            assert entries_of(cache, layer, row, head) == entries
    cache.free_sequences(torch.tensor(running, dtype=torch.int64))
    assert cache.allocator.num_in_use == 0
    assert cache.num_free_sequences == 5


def test_a_full_pool_says_what_to_do_and_stores_nothing():
    cache = PagedKVCache(SHAPE, 2, num_blocks=7)
    rows = cache.add_sequences(2)
    append = torch.ones(2, G, dtype=torch.bool)
    cache.write_newest(0, rows, append, torch.ones(2, G, D), torch.ones(2, G, D))
    with pytest.raises(OutOfBlocks, match=r"6 blocks needed, 1 of 7 free.*2 sequences; give the cache more blocks"):
        cache.write_newest(1, rows, append, torch.ones(2, G, D), torch.ones(2, G, D))
    assert not cache.cache_seqlens[1].any()
    cache.check_integrity()


def test_a_growing_pool_holds_little_more_than_is_used():
    cache = PagedKVCache(SHAPE, 1)
    rows = cache.add_sequences(1)
    append, ones = torch.ones(1, G, dtype=torch.bool), torch.ones(1, G, D)
    for _ in range(400):
        for layer in range(L):
            cache.write_newest(layer, rows, append, ones, ones)
    assert cache.allocator.num_in_use == L * G * 100
    assert cache.allocator.num_blocks <= 1.5 * L * G * 100


def test_usage_counts_entries_blocks_and_running_sums():
    cache = PagedKVCache(SHAPE, 3)
    rows = cache.add_sequences(2)
    lengths = torch.tensor([[5, 1, 8], [2, 2, 4]], dtype=torch.int32)
    for layer in range(L):
        cache.write_prompt(layer, rows, torch.ones(2, G, 8, D), torch.ones(2, G, 8, D), lengths)
    cache.num_tokens[rows] = torch.tensor([10, 6])
    usage = CacheUsage.of(cache, rows)
    assert usage.entries == ((7, 3, 12),) * L
    assert usage.blocks == ((3, 2, 3),) * L
    assert usage.num_tokens == 16
    assert usage.compression_ratio == 16 * L * G / (22 * L)
    block_bytes, state_bytes = 2 * P * D * 4, (2 * D + 1) * 4
    assert usage.bytes_held == L * (8 * block_bytes + 2 * G * state_bytes)
    assert usage.uncompressed_bytes == L * G * (3 + 2) * block_bytes
    parts = [CacheUsage.of(cache, rows[:1]), CacheUsage.of(cache, rows[1:])]
    assert CacheUsage.total(parts) == usage
    described = usage.to_dict()
    assert described["bytes"] == sum(map(sum, described["per_layer_and_kv_head"]["bytes"]))
    assert described["entries"] == sum(map(sum, described["per_layer_and_kv_head"]["entries"]))

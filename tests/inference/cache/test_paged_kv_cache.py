"""The paged cache against lists: random passes that append and overwrite, prompts that are cut, departures."""

import random

import pytest
import torch

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.methods.base import Keep, Slot, Update
from megatron_dmc.methods.step import Step

L, G, D, P = 2, 3, 4, 4
SUMS = Slot((2 * D + 1,))
SHAPE = CacheShape(num_layers=L, num_kv_heads=G, head_dim=D, dtype=torch.float32, state={"sums": SUMS}, block_size=P)


class ListCache:
    """The same cache as a dictionary: (layer, row, head) -> entries by place, each a pair of lists."""

    def __init__(self):
        self.entries = {}

    def write(self, layer, step, update):
        for token, sequence in enumerate(step.sequence_T.tolist()):
            for head in range(G):
                entries = self.entries.setdefault((layer, step.rows[sequence], head), {})
                entry = int(update.entry_TG[token, head])
                if entry >= 0:
                    entries[entry] = (update.k_TGD[token, head].tolist(), update.v_TGD[token, head].tolist())

    def compact(self, layer, step, keep):
        for sequence, row in enumerate(step.rows):
            for head in range(G):
                kept = keep.entry_BGE[sequence, head, : keep.length_BG[sequence, head]].tolist()
                entries = self.entries[layer, row, head]
                self.entries[layer, row, head] = {place: entries[entry] for place, entry in enumerate(kept)}

    def free(self, rows):
        self.entries = {key: value for key, value in self.entries.items() if key[1] not in rows}


def random_update(draw, step, length_BG):
    """Every head appends or overwrites as it likes; a token that another one of the pass overwrites writes nothing."""
    entry_TG = torch.full((step.num_tokens, G), -1, dtype=torch.int32)
    for sequence, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
        for head in range(G):
            length = int(length_BG[sequence, head])
            written = {}
            for token in range(start, start + count):
                entry = length if not length or draw.random() < 0.6 else draw.randrange(length)
                length = max(length, entry + 1)
                written[entry] = token
            for entry, token in written.items():
                entry_TG[token, head] = entry
    k, v = torch.randn(2, step.num_tokens, G, D)
    return Update(k, v, entry_TG, {"sums": torch.randn(len(step.rows), G, *SUMS.shape)})


def random_keep(draw, length_BG):
    longest = int(length_BG.max())
    entry_BGE = torch.stack([torch.randperm(longest) for _ in range(length_BG.numel())])
    entry_BGE = entry_BGE.view(*length_BG.shape, longest)
    kept_BG = torch.empty_like(length_BG)
    for sequence in range(len(length_BG)):
        for head in range(G):
            inside = [entry for entry in entry_BGE[sequence, head].tolist() if entry < length_BG[sequence, head]]
            kept = sorted(inside[: draw.randint(1, len(inside))])
            entry_BGE[sequence, head, : len(kept)] = torch.tensor(kept)
            kept_BG[sequence, head] = len(kept)
    return Keep(entry_BGE, kept_BG, {})


def run_pass(draw, cache, lists, rows, counts):
    cache.reserve(rows, counts)
    step = Step(rows, [cache.num_tokens[row] for row in rows], counts, torch.ones(D // 2))
    for layer in range(L):
        _, length_BG = cache.before(layer, step)
        update = random_update(draw, step, length_BG)
        caches = cache.write(layer, step, update)
        lists.write(layer, step, update)
        if not step.decodes and draw.random() < 0.5:
            keep = random_keep(draw, caches.length_BG)
            cache.compact(layer, step, keep)
            lists.compact(layer, step, keep)
    cache.commit(step)


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
        if cache.rows.num_free and draw.random() < 0.2:
            rows = cache.add_sequences(draw.randint(1, cache.rows.num_free))
            run_pass(draw, cache, lists, rows, [draw.randint(1, 11) for _ in rows])
            running += rows
        elif running and draw.random() < 0.1:
            rows = draw.sample(running, draw.randint(1, len(running)))
            cache.free_sequences(rows)
            lists.free(rows)
            running = [row for row in running if row not in rows]
        elif running:
            rows = draw.sample(running, draw.randint(1, len(running)))
            longest = draw.choice([1, 1, 1, 6])
            run_pass(draw, cache, lists, rows, [draw.randint(1, longest) for _ in rows])
        cache.check_integrity()
        for (layer, row, head), entries in lists.entries.items():
            assert entries_of(cache, layer, row, head) == [entries[place] for place in range(len(entries))]
    cache.free_sequences(running)
    cache.check_integrity()
    assert cache.blocks.num_in_use == cache.rows.num_in_use == 0
    assert not cache.state["sums"].any()


def append_everywhere(cache, rows):
    cache.reserve(rows, [1] * len(rows))
    step = Step(rows, [cache.num_tokens[row] for row in rows], [1] * len(rows), torch.ones(D // 2))
    for layer in range(L):
        ones = torch.ones(len(rows), G, D)
        cache.write(layer, step, Update(ones, ones, cache.before(layer, step)[1], {}))
    cache.commit(step)


def test_a_full_pool_says_what_to_do_before_anything_is_stored():
    cache = PagedKVCache(SHAPE, 2, num_blocks=19)
    rows = cache.add_sequences(2)
    for _ in range(4):
        append_everywhere(cache, rows)
    with pytest.raises(OutOfBlocks, match=r"12 blocks needed, 7 of 19 free.*2 sequences; give the cache more blocks"):
        cache.reserve(rows, [1, 1])
    cache.check_integrity()
    cache.reserve(rows[:1], [1])


def test_a_growing_pool_holds_little_more_than_is_used():
    cache = PagedKVCache(SHAPE, 1)
    rows = cache.add_sequences(1)
    for _ in range(400):
        append_everywhere(cache, rows)
    assert cache.blocks.num_in_use == L * G * 100
    assert cache.blocks.total <= 1.5 * L * G * 100


def test_a_prompt_takes_little_more_than_it_leaves():
    """A pool that grows holds what was written and one layer's upper bound, not the uncompressed prompt."""
    shape = CacheShape(num_layers=20, num_kv_heads=G, head_dim=D, dtype=torch.float32, block_size=P)
    cache = PagedKVCache(shape, 1)
    rows = cache.add_sequences(1)
    step = Step(rows, [0], [400], torch.ones(D // 2))
    entry_TG = torch.full((400, G), -1, dtype=torch.int32)
    entry_TG[::8] = torch.arange(50, dtype=torch.int32).unsqueeze(-1)
    cache.reserve(rows, step.counts)
    for layer in range(20):
        cache.write(layer, step, Update(torch.ones(400, G, D), torch.ones(400, G, D), entry_TG, {}))
        cache.check_integrity()
    cache.commit(step)
    assert cache.blocks.num_in_use == 20 * G * 13
    assert cache.blocks.total <= 1.5 * (20 * 13 + 100) * G


def test_a_row_given_back_twice_is_a_fault_and_is_not_handed_out_twice():
    cache = PagedKVCache(SHAPE, 2)
    rows = cache.add_sequences(2)
    cache.free_sequences(rows[:1])
    with pytest.raises(AssertionError, match="rows not in use"):
        cache.free_sequences(rows[:1])
    cache.check_integrity()
    with pytest.raises(OutOfBlocks, match="3 rows needed, 1 of 2 free"):
        cache.add_sequences(3)


def test_integrity_names_a_free_row_that_holds_blocks():
    cache = PagedKVCache(SHAPE, 2)
    rows = cache.add_sequences(1)
    append_everywhere(cache, rows)
    cache.rows.release(rows)
    with pytest.raises(AssertionError, match=r"free rows that hold blocks: \[0\]"):
        cache.check_integrity()


def test_usage_counts_entries_blocks_and_state():
    cache = PagedKVCache(SHAPE, 3)
    rows = cache.add_sequences(2)
    step = Step(rows, [0, 0], [10, 6], torch.ones(D // 2))
    lengths = torch.tensor([[5, 1, 8], [2, 2, 4]])
    entry_TG = step.offset_T.unsqueeze(-1).expand(-1, G)
    entry_TG = torch.where(entry_TG < lengths[step.sequence_T], entry_TG, -1).to(torch.int32)
    cache.reserve(rows, step.counts)
    for layer in range(L):
        cache.write(layer, step, Update(torch.ones(16, G, D), torch.ones(16, G, D), entry_TG, {}))
    cache.commit(step)
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

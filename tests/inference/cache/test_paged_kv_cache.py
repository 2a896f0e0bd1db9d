"""The paged cache against lists: random passes that append and overwrite, prompts that are cut, copies, departures."""

import copy
import dataclasses
import random
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import CacheShape, PagedKVCache
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.methods.base import Keep, Slot, Update
from megatron_dmc.methods.step import Step
from megatron_dmc.ops.kv_quantization import dequantise, find_kv_format, quantise
from megatron_dmc.ops.paged_attention.reference import read_entries

L, G, D, P = 2, 3, 4, 4
SUMS = Slot((2 * D + 1,))
SHAPE = CacheShape(num_layers=L, num_kv_heads=G, head_dim=D, dtype=torch.float32, state={"sums": SUMS}, block_size=P)
NEWEST = dataclasses.replace(SHAPE, only_newest_changes=True)


class ListCache:
    """The same cache as a dictionary: (layer, row, head) -> entries by place, each a pair of lists.

    An entry is quantised when the next token writes another place; that of the newest token is open until then.
    """

    def __init__(self, kv_dtype="auto"):
        self.kv_format = find_kv_format(kv_dtype)
        self.entries, self.open = {}, {}

    def write(self, layer, step, update):
        for token, sequence in enumerate(step.sequence_T.tolist()):
            for head in range(G):
                key, entry = (layer, step.rows[sequence], head), int(update.entry_TG[token, head])
                if entry >= 0:
                    entries = self.entries.setdefault(key, {})
                    if key in self.open:
                        entries[self.open[key]] = [self.closed(x) for x in entries[self.open[key]]]
                    entries[entry] = [update.k_TGD[token, head].tolist(), update.v_TGD[token, head].tolist()]
                    self.open[key] = entry

    def closed(self, x_D):
        if self.kv_format.dtype is None:
            return x_D
        return dequantise(*quantise(torch.tensor(x_D), self.kv_format), torch.float32).tolist()

    def compact(self, layer, step, keep):
        for sequence, row in enumerate(step.rows):
            for head in range(G):
                key = (layer, row, head)
                kept = keep.entry_BGE[sequence, head, : keep.length_BG[sequence, head]].tolist()
                self.entries[key] = {place: self.entries[key][entry] for place, entry in enumerate(kept)}
                newest = self.open.pop(key)
                if newest in kept:
                    self.open[key] = kept.index(newest)

    def fork(self, row, rows):
        for held in (self.entries, self.open):
            for (layer, source, head), value in list(held.items()):
                if source == row:
                    held.update({(layer, new, head): copy.copy(value) for new in rows})

    def free(self, rows):
        self.entries, self.open = (
            {key: value for key, value in held.items() if key[1] not in rows} for held in (self.entries, self.open)
        )


def random_update(draw, step, length_BG, only_newest):
    """Every head appends or overwrites as it likes; a token that another one of the pass overwrites writes nothing."""
    entry_TG = torch.full((step.num_tokens, G), -1, dtype=torch.int32)
    for sequence, (start, count) in enumerate(zip(step.starts, step.counts, strict=True)):
        for head in range(G):
            length = int(length_BG[sequence, head])
            written = {}
            for token in range(start, start + count):
                changed = length - 1 if only_newest else draw.randrange(max(length, 1))
                entry = length if not length or draw.random() < 0.6 else changed
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
    only_newest = cache.shape.only_newest_changes
    step = Step(rows, [cache.num_tokens[row] for row in rows], counts, torch.ones(D // 2))
    for layer in range(L):
        _, length_BG = cache.before(layer, step)
        update = random_update(draw, step, length_BG, only_newest)
        caches = cache.write(layer, step, update)
        cache.set_state(layer, step, update.state)
        lists.write(layer, step, update)
        if not step.decodes and not only_newest and draw.random() < 0.5:
            keep = random_keep(draw, caches.length_BG)
            cache.compact(layer, step, keep)
            lists.compact(layer, step, keep)
    cache.commit(step)


def entries_of(cache, layer, row, head):
    """What ``cache`` holds for one head, entry by entry through its block table."""
    kv = cache.pool.of(layer, torch.arange(cache.rows.total))
    entries = read_entries(kv, cache.block_table[layer], cache.cache_seqlens[layer], row, head)
    return [[x.tolist() for x in entry] for entry in entries]


def of_format(shape, kv_dtype):
    return dataclasses.replace(shape, kv_format=find_kv_format(kv_dtype))


@pytest.mark.parametrize(
    ("options", "kv_dtype"),
    [
        ({}, "auto"),
        ({"num_blocks": 600}, "auto"),
        ({"num_blocks": 1, "may_grow": True}, "auto"),
        ({"num_blocks": 600}, "fp8"),
        ({"num_blocks": 1, "may_grow": True}, "int8"),
    ],
    ids=["any size", "fixed", "growing", "fixed, fp8", "growing, int8"],
)
@pytest.mark.parametrize("shape", [SHAPE, NEWEST], ids=["any entry changes", "only the newest changes"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_trace_against_lists(options, kv_dtype, shape, seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    cache, lists, running = PagedKVCache(of_format(shape, kv_dtype), 5, **options), ListCache(kv_dtype), []
    for _ in range(80):
        action = draw.random()
        if cache.rows.num_free and action < 0.2:
            rows = cache.add_sequences(draw.randint(1, cache.rows.num_free))
            run_pass(draw, cache, lists, rows, [draw.randint(1, 11) for _ in rows])
            running += rows
        elif cache.rows.num_free and running and action < 0.35:
            row = draw.choice(running)
            rows = cache.fork(row, draw.randint(1, cache.rows.num_free))
            lists.fork(row, rows)
            assert torch.equal(cache.state["sums"][:, rows], cache.state["sums"][:, [row] * len(rows)])
            running += rows
        elif running and action < 0.5:
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
    frequencies = torch.ones(D // 2, device=cache.device)
    step = Step(rows, [cache.num_tokens[row] for row in rows], [1] * len(rows), frequencies)
    for layer in range(L):
        ones = torch.ones(len(rows), G, D, dtype=cache.shape.dtype, device=cache.device)
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


def resident_bytes():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(fields["VmRSS"].split()[0])


def test_a_pool_without_a_size_takes_memory_as_it_is_written():
    """It has room for all sequences, uncompressed; what nobody wrote costs nothing."""
    shape = dataclasses.replace(SHAPE, head_dim=256, block_size=32, max_tokens=10_000)
    before = resident_bytes()
    cache = PagedKVCache(shape, 40)
    assert cache.blocks.total == 40 * L * G * (10_000 // 32 + 1)
    cache.add_sequences(1)
    cache.pool.kv.k_blocks[:1000] = 1.0
    written, pool = 1000 * 32 * 256 * 4, 2 * cache.pool.kv.k_blocks.nbytes
    assert pool > 40 * written
    assert written <= resident_bytes() - before < 2 * written


def test_a_pool_larger_than_what_the_system_gives_says_what_to_do():
    with pytest.raises(ValueError, match=r"no address range of .* for the cache .* give the number of its blocks"):
        PagedKVCache(SHAPE, 1, num_blocks=1 << 45)


def test_a_prompt_takes_the_blocks_that_its_entries_need():
    cache = PagedKVCache(SHAPE, 1, num_blocks=L * G * 13)
    rows = cache.add_sequences(1)
    step = Step(rows, [0], [400], torch.ones(D // 2))
    entry_TG = torch.full((400, G), -1, dtype=torch.int32)
    entry_TG[7::8] = torch.arange(50, dtype=torch.int32).unsqueeze(-1)
    cache.reserve(rows, step.counts)
    for layer in range(L):
        cache.write(layer, step, Update(torch.ones(400, G, D), torch.ones(400, G, D), entry_TG, {}))
        cache.check_integrity()
    assert cache.blocks.num_free == 0
    another = PagedKVCache(SHAPE, 1, num_blocks=L * G * 13 - 1)
    another.add_sequences(1)
    another.reserve(rows, step.counts)
    another.write(0, step, Update(torch.ones(400, G, D), torch.ones(400, G, D), entry_TG, {}))
    with pytest.raises(OutOfBlocks, match="39 blocks needed, 38 of 77 free"):
        another.write(1, step, Update(torch.ones(400, G, D), torch.ones(400, G, D), entry_TG, {}))
    another.free_sequences(rows)
    another.check_integrity()
    assert another.blocks.num_in_use == 0


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_step_of_decoding_reads_nothing_back(kv_dtype):
    """Tensors without data: whoever asks for their numbers fails. A GPU would have to wait for them."""
    with FakeTensorMode():
        cache = PagedKVCache(of_format(SHAPE, kv_dtype), 4, num_blocks=200, device="cuda")
        rows = cache.add_sequences(3)
        for _ in range(5):
            append_everywhere(cache, rows)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            for _ in range(20):
                append_everywhere(cache, rows)


@pytest.mark.parametrize(("shape", "num_copied"), [(SHAPE, 3), (NEWEST, 1)])
def test_copies_share_the_blocks_that_no_step_changes(shape, num_copied):
    cache = PagedKVCache(shape, 5)
    (row,) = cache.add_sequences(1)
    for _ in range(10):
        append_everywhere(cache, [row])
    copies = cache.fork(row, 3)
    assert cache.blocks.num_in_use == L * G * (3 + 3 * num_copied)
    assert [cache.num_tokens[copy] for copy in copies] == [10] * 3
    cache.check_integrity()
    append_everywhere(cache, copies[:1])
    assert cache.cache_seqlens[0, [row, *copies], 0].tolist() == [10, 11, 10, 10]
    cache.free_sequences([row])
    cache.check_integrity()
    assert cache.cache_seqlens[:, copies[1:]].eq(10).all()
    assert entries_of(cache, 1, copies[2], 0) == [[[1.0] * D, [1.0] * D]] * 10
    cache.free_sequences(copies)
    cache.check_integrity()
    assert cache.blocks.num_in_use == 0


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("may_grow", [False, True])
def test_copies_in_a_cache_of_their_own(may_grow, kv_dtype):
    """In any order and number, with nothing shared: what is read later stays apart."""
    draw, lists = random.Random(0), ListCache(kv_dtype)
    cache = PagedKVCache(of_format(SHAPE, kv_dtype), 3, num_blocks=1 if may_grow else None, may_grow=may_grow)
    rows = cache.add_sequences(3)
    run_pass(draw, cache, lists, rows, [9, 1, 14])
    chosen = [rows[2], rows[0], rows[2]]
    copied = cache.copies(chosen)
    copied.check_integrity()
    held = [[entries_of(cache, layer, row, head) for layer in range(L) for head in range(G)] for row in chosen]
    run_pass(draw, cache, lists, rows, [1, 1, 1])
    for row, (source, entries) in enumerate(zip(chosen, held, strict=True)):
        assert [entries_of(copied, layer, row, head) for layer in range(L) for head in range(G)] == entries
        assert copied.num_tokens[row] == cache.num_tokens[source] - 1
    append_everywhere(copied, [0])
    assert entries_of(copied, 0, 2, 0) == held[2][0]
    copied.free_sequences([0, 1, 2])
    copied.check_integrity()
    assert copied.blocks.num_in_use == 0
    cache.check_integrity()


def test_a_copy_for_which_there_is_no_room_changes_nothing():
    cache = PagedKVCache(NEWEST, 4, num_blocks=L * G * 4 - 1)
    (row,) = cache.add_sequences(1)
    for _ in range(6):
        append_everywhere(cache, [row])
    before = (cache.block_table.clone(), cache.held_blocks.clone(), cache.blocks.num_free)
    with pytest.raises(OutOfBlocks, match="12 blocks needed, 11 of 23 free"):
        cache.fork(row, 2)
    with pytest.raises(OutOfBlocks, match="4 rows needed, 3 of 4 free"):
        cache.fork(row, 4)
    assert torch.equal(cache.block_table, before[0])
    assert torch.equal(cache.held_blocks, before[1])
    assert (cache.blocks.num_free, cache.rows.num_free) == (before[2], 3)
    cache.check_integrity()
    assert len(cache.fork(row, 1)) == 1


def test_a_sequence_that_has_read_nothing_can_be_copied():
    cache = PagedKVCache(NEWEST, 2)
    rows = cache.add_sequences(1)
    rows += cache.fork(rows[0], 1)
    append_everywhere(cache, rows)
    cache.check_integrity()


def test_taken_blocks_hold_numbers_whatever_was_in_them():
    """Attention on a CPU multiplies values beyond the length of a head by 0."""
    cache = PagedKVCache(SHAPE, 1, num_blocks=L * G * 2)
    for pool in (cache.pool.kv.k_blocks, cache.pool.kv.v_blocks):
        pool.fill_(torch.nan)
    rows = cache.add_sequences(1)
    for _ in range(5):
        append_everywhere(cache, rows)
    assert cache.pool.kv.k_blocks.isfinite().all()
    assert cache.pool.kv.v_blocks.isfinite().all()


def test_a_row_given_back_twice_is_a_fault_and_is_not_handed_out_twice():
    cache = PagedKVCache(SHAPE, 2)
    rows = cache.add_sequences(2)
    cache.free_sequences(rows[:1])
    with pytest.raises(AssertionError, match="rows not in use"):
        cache.free_sequences(rows[:1])
    cache.check_integrity()
    with pytest.raises(OutOfBlocks, match="3 rows needed, 1 of 2 free"):
        cache.add_sequences(3)


def test_integrity_names_a_shared_block_that_may_change():
    cache = PagedKVCache(NEWEST, 2)
    rows = cache.add_sequences(2)
    append_everywhere(cache, rows)
    block, lost = cache.block_table[0, :, 0, 0].tolist()
    cache.block_table[0, rows[1], 0, 0] = block
    cache.blocks.holders_X[lost], cache.blocks.holders_X[block] = 0, 2
    with pytest.raises(AssertionError, match="shared blocks that a step may change: 2 != 0"):
        cache.check_integrity()


def test_integrity_names_a_free_row_that_holds_blocks():
    cache = PagedKVCache(SHAPE, 2)
    rows = cache.add_sequences(1)
    append_everywhere(cache, rows)
    cache.rows.release(rows)
    with pytest.raises(AssertionError, match=r"free rows that hold blocks: \[0\]"):
        cache.check_integrity()


@pytest.mark.parametrize(
    ("shape", "place", "message"),
    [
        (SHAPE, 3, "open entries outside their head caches: 1 != 0"),
        (NEWEST, 0, "open entries that are not the last ones: 1 != 0"),
    ],
)
def test_integrity_names_an_open_entry_out_of_place(shape, place, message):
    cache = PagedKVCache(of_format(shape, "int8"), 2)
    rows = cache.add_sequences(1)
    for _ in range(3):
        append_everywhere(cache, rows)
    cache.check_integrity()
    cache.pool.kv.open_entry_BG[1, rows[0], 2] = place
    with pytest.raises(AssertionError, match=message):
        cache.check_integrity()


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8"])
def test_usage_counts_scales_and_open_entries(kv_dtype):
    shape = dataclasses.replace(of_format(SHAPE, kv_dtype), dtype=torch.bfloat16)
    cache = PagedKVCache(shape, 1)
    rows = cache.add_sequences(1)
    for _ in range(9):
        append_everywhere(cache, rows)
    usage, kv = CacheUsage.of(cache, rows), cache.pool.kv
    assert kv.k_blocks.dtype == shape.kv_format.dtype
    per_block = sum(x[0].nbytes for x in (kv.k_blocks, kv.v_blocks, kv.k_scale, kv.v_scale))
    beside = sum(x.nbytes for x in (kv.k_open, kv.v_open, kv.open_entry_BG, cache.state["sums"]))
    assert usage.bytes_held == L * G * 3 * per_block + beside
    assert usage.uncompressed_bytes == L * G * 3 * 2 * P * D * 2
    assert f"{L * G * 9} entries in {kv_dtype}, " in usage.summary()
    assert usage.to_dict()["kv_dtype"] == kv_dtype


def test_usage_counts_entries_blocks_and_state():
    cache = PagedKVCache(SHAPE, 3)
    rows = cache.add_sequences(2)
    step = Step(rows, [0, 0], [10, 6], torch.ones(D // 2))
    lengths = torch.tensor([[5, 1, 8], [2, 2, 4]])
    surplus = torch.tensor(step.counts).unsqueeze(-1) - lengths
    entry_TG = (step.offset_T.unsqueeze(-1) - surplus[step.sequence_T]).clamp(min=-1).to(torch.int32)
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

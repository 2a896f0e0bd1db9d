"""Steps of decoding in one layer, next to lists of entries that grow as the paper says.

Legend: S steps, B sequences, A rows of the cache, N query heads, G KV heads, D head dim, C = D / 2.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dmc.ops import decisions
from megatron_dmc.ops.cache_update import (
    FreeBlocks,
    HeadCaches,
    Logits,
    Merging,
    NewTokens,
    reference,
    state_shape,
    update_caches,
)
from megatron_dmc.ops.kv_quantization import find_kv_format
from megatron_dmc.ops.kv_quantization.reference import dequantise, quantise
from megatron_dmc.ops.paged_attention.reference import read_entries
from megatron_dmc.ops.paged_kv import PagedKV
from megatron_dmc.ops.rope import apply_rope, cos_sin, inverse_frequencies

NUM_ROWS = 4
"""More than the sequences of a test: the others must stay as they are."""
ATOL = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@dataclass
class Case:
    """What a trace is made of. ``merging`` None appends every token."""

    merging: Merging | None
    per_layer: bool = False
    group: int = 2
    head_dim: int = 16
    block_size: int = 4
    kv_dtype: str = "auto"
    open_entries: bool = True
    neuron_scale: float = 0.0
    dtype: torch.dtype = torch.float32
    has_free_list: bool = True
    num_steps: int = 10
    rows: list[int] = field(default_factory=lambda: [2, 0])
    num_kv_heads: int = 2


def empty_caches(case: Case) -> HeadCaches:
    """Caches whose memory was another sequence's: NaN everywhere, but for lengths and open entries."""
    heads = (NUM_ROWS, case.num_kv_heads)
    width = case.num_steps // case.block_size + 1
    num_blocks = NUM_ROWS * case.num_kv_heads * width
    stored = find_kv_format(case.kv_dtype).dtype
    pool = (num_blocks, case.block_size, case.head_dim)
    unwritten = 99 if stored == torch.int8 else torch.nan
    k_blocks, v_blocks = (torch.full(pool, unwritten, dtype=stored or case.dtype) for _ in range(2))
    kv = PagedKV(k_blocks, v_blocks)
    if stored is not None:
        kv = kv._replace(k_scale=torch.full(pool[:2], torch.nan), v_scale=torch.full(pool[:2], torch.nan))
        if case.open_entries:
            k_open, v_open = (torch.full((*heads, case.head_dim), torch.nan, dtype=case.dtype) for _ in range(2))
            kv = kv._replace(k_open=k_open, v_open=v_open, open_entry_BG=torch.full(heads, -1, dtype=torch.int32))
    table = torch.full((*heads, width), 2**30, dtype=torch.int32)
    if not case.has_free_list:
        table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).view(table.shape).int()
    lengths = torch.zeros(heads, dtype=torch.int32)
    state = None
    if case.merging is not None:
        state = torch.full((*heads, *state_shape(case.head_dim, case.merging.window_size)), torch.nan)
    return HeadCaches(kv, table, lengths, state)


def free_list(caches: HeadCaches) -> FreeBlocks:
    """All blocks in a random order."""
    num_blocks = len(caches.kv.k_blocks)
    block_F = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(2)).to(torch.int32)
    return FreeBlocks(block_F, torch.tensor([num_blocks], dtype=torch.int32))


def random_tokens(case: Case, step: int) -> NewTokens:
    """Projections of one token per sequence, slices of one tensor as a model has them; decisions on both sides of 0."""
    generator = torch.Generator().manual_seed(100 + step)
    num_heads = case.num_kv_heads * (case.group + 2)
    qkv = torch.randn(len(case.rows), num_heads, case.head_dim, generator=generator).to(case.dtype)
    q, k, v = qkv.split([case.num_kv_heads * case.group, case.num_kv_heads, case.num_kv_heads], dim=1)
    # Sequences of different ages; the first step is position 0 for all of them.
    position_B = torch.tensor([step * (1 + index) for index in range(len(case.rows))])
    return NewTokens(q, k, v, position_B, *cos_sin(position_B, inverse_frequencies(case.head_dim, 10000.0)))


class Lists:
    """The entries of every head cache as lists, and what they must be in the pool."""

    def __init__(self, case: Case) -> None:
        window_size = 0 if case.merging is None else case.merging.window_size
        self.case = case
        self.heads = {
            (row, head): reference.HeadCache(window_size) for row in case.rows for head in range(case.num_kv_heads)
        }

    def update(self, tokens: NewTokens, accumulate_BG: Tensor, omega_BG: Tensor) -> None:
        """One token of each sequence."""
        for index, row in enumerate(self.case.rows):
            for head in range(self.case.num_kv_heads):
                cache = self.heads[row, head]
                k_D, v_D = tokens.k_BGD[index, head].float(), tokens.v_BGD[index, head].float()
                rotary = (tokens.cos_BC[index], tokens.sin_BC[index])
                if self.case.merging is None:
                    cache.keys.append(faded_rope(k_D, *rotary, self.case.neuron_scale))
                    cache.values.append(v_D)
                else:
                    cache.update(k_D, v_D, bool(accumulate_BG[index, head]), omega_BG[index, head], *rotary)

    def check(self, caches: HeadCaches) -> None:
        """Compare every entry of every head cache; rows of nobody are empty."""
        lengths = torch.zeros_like(caches.cache_seqlens_AG)
        for (row, head), cache in self.heads.items():
            lengths[row, head] = len(cache.keys)
        assert torch.equal(caches.cache_seqlens_AG, lengths)
        for (row, head), cache in self.heads.items():
            found = read_entries(caches.kv, caches.block_table_AGM, lengths, row, head)
            for entry, (key, value) in enumerate(found):
                is_open = entry == len(found) - 1 and self.case.open_entries
                self._check_entry(key, cache.keys[entry], is_open)
                self._check_entry(value, cache.values[entry], is_open)

    def _check_entry(self, found_D: Tensor, expected_D: Tensor, is_open: bool) -> None:
        kv_format = find_kv_format(self.case.kv_dtype)
        atol = ATOL[self.case.dtype]
        if kv_format.dtype is not None and not is_open:
            # A number may be rounded to one side of a half or to the other: one step of int8, of 3 bits in fp8.
            atol += float(expected_D.abs().max()) * (1 / 127 if self.case.kv_dtype == "int8" else 2**-4)
            expected_D = dequantise(*quantise(expected_D.to(self.case.dtype), kv_format))
        torch.testing.assert_close(found_D, expected_D, atol=atol, rtol=0)


def faded_rope(x: Tensor, cos: Tensor, sin: Tensor, neuron_scale: float) -> Tensor:
    """RoPE between two multiplications of the last channel."""
    fade = torch.ones_like(x)
    fade[..., -1] = neuron_scale
    return apply_rope(x * fade, cos, sin) * fade


def check_trace(case: Case) -> None:
    """Decode step by step; after each, entries, lengths, rotated queries and decisions are as they must be."""
    caches, lists = empty_caches(case), Lists(case)
    free = free_list(caches) if case.has_free_list else None
    rows_B = torch.tensor(case.rows)
    seen = set()
    for step in range(case.num_steps):
        tokens = random_tokens(case, step)
        accumulate_BG = torch.zeros(len(case.rows), case.num_kv_heads, dtype=torch.bool)
        logits, omega_BG = None, torch.ones(accumulate_BG.shape)
        if case.merging is not None:
            logits = own_logits(tokens, case)
            decision, importance = (x.expand(accumulate_BG.shape) for x in logits)
            accumulate_BG = (decision > case.merging.decision_threshold) & (step > 0)
            omega_BG = torch.sigmoid(importance) + case.merging.importance_epsilon
        q_BND, found_BG = update_caches(
            tokens,
            caches,
            rows_B,
            merging=case.merging,
            logits=logits if case.per_layer else None,
            neuron_scale=case.neuron_scale,
            free=free,
        )
        assert torch.equal(found_BG, accumulate_BG)
        expected = faded_rope(tokens.q_BND.float(), tokens.cos_BC[:, None], tokens.sin_BC[:, None], case.neuron_scale)
        torch.testing.assert_close(q_BND.float(), expected, atol=ATOL[case.dtype], rtol=0)
        lists.update(tokens, accumulate_BG, omega_BG)
        lists.check(caches)
        seen |= set(accumulate_BG.flatten().tolist())
    assert seen == ({False} if case.merging is None else {False, True})
    if free is not None:
        check_blocks(caches, free, case.block_size)


def check_blocks(caches: HeadCaches, free: FreeBlocks, block_size: int) -> None:
    """Every block is free or held by one head cache."""
    held = []
    for row, lengths in enumerate(caches.cache_seqlens_AG.tolist()):
        for head, length in enumerate(lengths):
            held += caches.block_table_AGM[row, head, : -(-length // block_size)].tolist()
    assert sorted(held + free.block_F[: int(free.num_free)].tolist()) == list(range(len(caches.kv.k_blocks)))


def own_logits(tokens: NewTokens, case: Case) -> Logits:
    """Decision and importance logits of every head, or their means over the layer."""
    assert case.merging is not None
    decision = decisions.decision_logits(tokens.k_BGD, case.merging.decision_bias)
    importance = decisions.importance_logits(tokens.q_BND, case.num_kv_heads, case.merging.decision_bias)
    if case.per_layer:
        return Logits(decision.mean(-1, keepdim=True), importance.mean(-1, keepdim=True))
    return Logits(decision, importance)

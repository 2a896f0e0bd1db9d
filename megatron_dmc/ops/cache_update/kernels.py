"""One step of decoding in the cache as one Triton kernel: decide, pool, rotate, write.

One program does everything for one (sequence, KV head), which nobody else touches, and in float32: it reads the logits
from the borrowed channel, adds the token to the sums of the open segment or begins a new one, turns the mean and the
queries of the head by RoPE, finds or takes the block of the entry, writes it, and counts. Sums of a window are added
afresh over its ring, never subtracted from.

Vectors are halves of a head, as RoPE pairs their channels: C = D / 2, padded to a power of two. W window_size.
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of kernels as its own)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.cache_update.head_caches import FreeBlocks, HeadCaches, Logits, Merging, NewTokens
from megatron_dmc.ops.kv_quantization import format_of
from megatron_dmc.ops.kv_quantization.formats import SMALLEST

NO_MERGING = Merging(0.0, 0.0, 0.0, 0)
TINY = tl.constexpr(SMALLEST)
ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added and subtracted again it rounds a float32 below 2**22 to the nearest integer, halves to even."""


@triton.jit
def _rotated(first, second, cos, sin, half, neuron_scale, HALF: tl.constexpr):
    """RoPE of the two halves of a head whose last channel counts ``neuron_scale`` times before and after it."""
    fade = tl.where(half == HALF - 1, neuron_scale, 1.0)
    return first * cos - second * sin * fade, second * cos * fade * fade + first * sin * fade


@triton.jit
def _merged(sums, x, omega, accumulate, turn, inside, W: tl.constexpr, NUM_SUMS: tl.constexpr, BLOCK_W: tl.constexpr):
    """Sums of the segment with one token more, for the channels whose pointers in the state are ``sums``; stored."""
    ring = tl.arange(0, BLOCK_W)[:, None]
    places = sums[None, :] + ring * NUM_SUMS
    num_places: tl.constexpr = 1 if W == 0 else W
    mask = inside[None, :] & (ring < num_places)
    # Where a segment begins, memory may hold anything.
    kept = tl.load(places, mask=inside[None, :] & (ring < tl.where(accumulate, num_places, 0)), other=0.0)
    new = omega * x[None, :]
    kept = kept + new if W == 0 else tl.where(ring == turn, new, kept)
    tl.store(places, kept, mask=mask)
    return tl.sum(tl.where(mask, kept, 0.0), 0)


@triton.jit
def _store_entry(first, second, blocks_ptr, scale_ptr, slot, half, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """Write an entry of a block: as it is, or in 8 bits with its scale."""
    place = blocks_ptr + slot * (2 * HALF) + half
    if scale_ptr is not None:
        first, second = first.to(tl.float32), second.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(first), 0), tl.max(tl.abs(second), 0))
        scale = tl.maximum(largest, TINY) / LARGEST
        first = tl.clamp(first / scale, -LARGEST, LARGEST)
        second = tl.clamp(second / scale, -LARGEST, LARGEST)
        if blocks_ptr.dtype.element_ty == tl.int8:
            first = first + ROUNDING - ROUNDING
            second = second + ROUNDING - ROUNDING
        tl.store(scale_ptr + slot, scale)
    tl.store(place, first.to(blocks_ptr.dtype.element_ty), mask=half < HALF)
    tl.store(place + HALF, second.to(blocks_ptr.dtype.element_ty), mask=half < HALF)


@triton.jit(
    do_not_specialize=["num_kv_heads", "table_width"],
    # Where the numbers of a layer begin makes no other kernel.
    do_not_specialize_on_alignment=["open_entry_ptr", "table_ptr", "length_ptr", "state_ptr"],
)
def update_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    position_ptr,
    cos_ptr,
    sin_ptr,
    row_ptr,
    k_blocks_ptr,
    v_blocks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_open_ptr,
    v_open_ptr,
    open_entry_ptr,
    table_ptr,
    length_ptr,
    state_ptr,
    decision_ptr,
    importance_ptr,
    free_ptr,
    num_free_ptr,
    q_out_ptr,
    accumulate_ptr,
    q_stride_b,
    q_stride_n,
    k_stride_b,
    k_stride_g,
    v_stride_b,
    v_stride_g,
    num_kv_heads,
    table_width,
    decision_bias,
    decision_threshold,
    importance_epsilon,
    neuron_scale,
    R: tl.constexpr,
    HALF: tl.constexpr,
    P: tl.constexpr,
    W: tl.constexpr,
    LARGEST: tl.constexpr,
    DECIDE_PER_HEAD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    sequence, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = sequence * num_kv_heads + kv_head
    row = tl.load(row_ptr + sequence).to(tl.int64)
    if row < 0:
        tl.store(accumulate_ptr + head, False)
        return
    cache = row * num_kv_heads + kv_head
    half = tl.arange(0, BLOCK_C)
    inside = half < HALF
    query = tl.arange(0, BLOCK_R)
    position = tl.load(position_ptr + sequence)
    length = tl.load(length_ptr + cache)
    cos = tl.load(cos_ptr + sequence * HALF + half, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + sequence * HALF + half, mask=inside, other=0.0)

    # Queries of the group.
    q_rows = q_ptr + sequence * q_stride_b + (kv_head * R + query[:, None]) * q_stride_n + half[None, :]
    q_mask = (query < R)[:, None] & inside[None, :]
    q_first = tl.load(q_rows, mask=q_mask, other=0.0).to(tl.float32)
    q_second = tl.load(q_rows + HALF, mask=q_mask, other=0.0).to(tl.float32)
    q_out = q_out_ptr + (head * R + query[:, None]) * (2 * HALF) + half[None, :]
    turned_first, turned_second = _rotated(
        q_first, q_second, cos[None, :], sin[None, :], half[None, :], neuron_scale, HALF
    )
    tl.store(q_out, turned_first.to(q_out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(q_out + HALF, turned_second.to(q_out_ptr.dtype.element_ty), mask=q_mask)

    k_row = k_ptr + sequence * k_stride_b + kv_head * k_stride_g
    v_row = v_ptr + sequence * v_stride_b + kv_head * v_stride_g
    k_first = tl.load(k_row + half, mask=inside, other=0.0).to(tl.float32)
    k_second = tl.load(k_row + HALF + half, mask=inside, other=0.0).to(tl.float32)
    v_first = tl.load(v_row + half, mask=inside, other=0.0).to(tl.float32)
    v_second = tl.load(v_row + HALF + half, mask=inside, other=0.0).to(tl.float32)

    entry = length
    accumulate = position < 0
    if state_ptr is not None:
        if decision_ptr is not None:
            decider = head if DECIDE_PER_HEAD else sequence
            decision, importance = tl.load(decision_ptr + decider), tl.load(importance_ptr + decider)
        else:
            decision = tl.load(k_row + 2 * HALF - 1).to(tl.float32) - decision_bias
            borrowed = q_ptr + sequence * q_stride_b + (kv_head * R + query) * q_stride_n + 2 * HALF - 1
            importance = tl.sum(tl.load(borrowed, mask=query < R, other=0.0).to(tl.float32), 0) / R + decision_bias
        accumulate = (position > 0) & (decision > decision_threshold)
        omega = tl.sigmoid(importance) + importance_epsilon
        entry = length - accumulate.to(tl.int32)
    tl.store(accumulate_ptr + head, accumulate)

    table = table_ptr + cache * table_width
    if free_ptr is None:
        block = tl.load(table + entry // P)
    elif (entry == length) & (entry % P == 0):
        place = tl.atomic_add(num_free_ptr, -1, sem="relaxed") - 1
        block = tl.load(free_ptr + place, mask=place >= 0, other=-1)
        tl.store(table + entry // P, block, mask=place >= 0)
    else:
        block = tl.load(table + entry // P)
    if block < 0:
        return

    if state_ptr is not None:
        NUM_SUMS: tl.constexpr = 4 * HALF + 1
        sums = state_ptr + cache * (NUM_SUMS if W == 0 else W * NUM_SUMS)
        turn = 0 if W == 0 else position % W
        one = tl.arange(0, 1)
        z = _merged(sums + 4 * HALF + one, one + 1.0, omega, accumulate, turn, one == 0, W, NUM_SUMS, BLOCK_W)
        sums += half
        k_first = _merged(sums, k_first, omega, accumulate, turn, inside, W, NUM_SUMS, BLOCK_W) / z
        k_second = _merged(sums + HALF, k_second, omega, accumulate, turn, inside, W, NUM_SUMS, BLOCK_W) / z
        v_first = _merged(sums + 2 * HALF, v_first, omega, accumulate, turn, inside, W, NUM_SUMS, BLOCK_W) / z
        v_second = _merged(sums + 3 * HALF, v_second, omega, accumulate, turn, inside, W, NUM_SUMS, BLOCK_W) / z
    k_first, k_second = _rotated(k_first, k_second, cos, sin, half, neuron_scale, HALF)
    # An entry is first of all a number of the model's dtype, whatever it is stored as.
    k_first, k_second = (k_first.to(k_ptr.dtype.element_ty), k_second.to(k_ptr.dtype.element_ty))
    v_first, v_second = (v_first.to(v_ptr.dtype.element_ty), v_second.to(v_ptr.dtype.element_ty))

    if k_open_ptr is None:
        slot = block.to(tl.int64) * P + entry % P
        _store_entry(k_first, k_second, k_blocks_ptr, k_scale_ptr, slot, half, HALF, LARGEST)
        _store_entry(v_first, v_second, v_blocks_ptr, v_scale_ptr, slot, half, HALF, LARGEST)
    else:
        k_open, v_open = k_open_ptr + cache * (2 * HALF) + half, v_open_ptr + cache * (2 * HALF) + half
        before = tl.load(open_entry_ptr + cache)
        if (before >= 0) & (before != entry):
            slot = tl.load(table + before // P).to(tl.int64) * P + before % P
            first, second = tl.load(k_open, mask=inside, other=0.0), tl.load(k_open + HALF, mask=inside, other=0.0)
            _store_entry(first, second, k_blocks_ptr, k_scale_ptr, slot, half, HALF, LARGEST)
            first, second = tl.load(v_open, mask=inside, other=0.0), tl.load(v_open + HALF, mask=inside, other=0.0)
            _store_entry(first, second, v_blocks_ptr, v_scale_ptr, slot, half, HALF, LARGEST)
        # What other threads read here is read before it is overwritten.
        tl.debug_barrier()
        tl.store(k_open, k_first, mask=inside)
        tl.store(k_open + HALF, k_second, mask=inside)
        tl.store(v_open, v_first, mask=inside)
        tl.store(v_open + HALF, v_second, mask=inside)
        tl.store(open_entry_ptr + cache, entry)
    tl.debug_barrier()
    tl.store(length_ptr + cache, entry + 1)


def update_caches(
    tokens: NewTokens,
    caches: HeadCaches,
    rows_B: Tensor,
    *,
    merging: Merging | None = None,
    logits: Logits | None = None,
    neuron_scale: float = 1.0,
    free: FreeBlocks | None = None,
) -> tuple[Tensor, Tensor]:
    """See :func:`megatron_dmc.ops.cache_update.update_caches`."""
    kv, (q_BND, k_BGD, v_BGD) = caches.kv, tokens[:3]
    assert all(x.stride(-1) == 1 for x in tokens[:3])
    assert all(x.is_contiguous() for x in (*kv, *caches[1:]) if x is not None)
    batch, num_kv_heads, head_dim = k_BGD.shape
    group, half = q_BND.shape[1] // num_kv_heads, head_dim // 2
    window_size = 0 if merging is None else merging.window_size
    q_out_BND = torch.empty(q_BND.shape, dtype=q_BND.dtype, device=q_BND.device)
    accumulate_BG = torch.empty((batch, num_kv_heads), dtype=torch.bool, device=q_BND.device)
    with torch.cuda.device_of(q_BND):
        update_kernel[(batch, num_kv_heads)](
            *tokens[:4],
            tokens.cos_BC,
            tokens.sin_BC,
            rows_B,
            *kv,
            caches.block_table_AGM,
            caches.cache_seqlens_AG,
            caches.state if merging is not None else None,
            *(logits or (None, None)),
            *(free or (None, None)),
            q_out_BND,
            accumulate_BG,
            *q_BND.stride()[:2],
            *k_BGD.stride()[:2],
            *v_BGD.stride()[:2],
            num_kv_heads,
            caches.block_table_AGM.shape[-1],
            *(merging or NO_MERGING)[:3],
            neuron_scale,
            R=group,
            HALF=half,
            P=kv.block_size,
            W=window_size,
            LARGEST=format_of(kv.k_blocks.dtype).largest,
            DECIDE_PER_HEAD=logits is not None and logits.decision.shape[1] == num_kv_heads,
            BLOCK_R=triton.next_power_of_2(group),
            BLOCK_C=triton.next_power_of_2(half),
            BLOCK_W=triton.next_power_of_2(max(window_size, 1)),
            num_warps=1 if window_size == 0 else 4,
            enable_fp_fusion=True,
        )
    return q_out_BND, accumulate_BG

"""Split attention for decoding as Triton kernels: one query per sequence over head caches of different lengths.

Persistent programs take the chunks of the work list in turns. A chunk is found by binary search in the prefix sums,
read tile by tile, and leaves a partial result: maximum, sum and weighted values of its softmax, float32. A second
kernel adds the partial results of each query head, over the chunks of its own head cache only.

One query head per KV head is computed with vectors: every row of a tile keeps a softmax of its own, and rows meet once,
at the end of the chunk. Several query heads are the rows of matrix products, padded to the 16 that these take. Stored
numbers in 8 bits are multiplied by the scales of keys on the scores, by those of values on the probabilities. The open
entry of a head, which lies beside the blocks, is added to the chunk that its place falls into.

Scores are kept in units of log 2. Shapes: R query heads per KV head (padded), E entries of a tile, D channels (padded).
"""

# mypy: disable-error-code="no-untyped-def"
# (Triton reads annotations of kernels as its own)

from __future__ import annotations

import triton
import triton.language as tl

from megatron_dmc.ops.paged_attention.work_list import CHUNK_MULTIPLE

LN_2 = tl.constexpr(0.6931471805599453)
OF_A_LAYER = ["open_entry_ptr", "table_ptr", "length_ptr", "row_ptr", "order_ptr", "start_ptr"]
"""Tensors of numbers that are read one by one: where those of a layer begin makes no other kernel."""
ALIGN = tl.constexpr(CHUNK_MULTIPLE)
NO_SCORE = tl.constexpr(-1e30)
"""Below every score, and unlike -inf subtracted from itself without harm."""


@triton.jit
def _find(start_ptr, num_heads, item):
    """Rank of the head cache that chunk ``item`` belongs to: the last one that starts at or before it."""
    low, high = 0, num_heads
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) <= item:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _load_rows(base_ptr, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a tensor whose rows have D contiguous channels; 0 elsewhere."""
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] if D == BLOCK_D else inside[:, None] & (channel < D)
    return tl.load(base_ptr + rows[:, None] * D + channel, mask=mask, other=0.0)


@triton.jit
def _keep_scores(ptr, score, entry, inside, max_entries, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """Store scores [BLOCK_R, E] at their entries."""
    query = tl.arange(0, BLOCK_R)[:, None]
    tl.store(ptr + query * max_entries + entry[None, :], score, mask=inside[None, :] & (query < R))


@triton.jit
def _with_vectors(
    q,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table,
    scores,
    first,
    last,
    open_entry,
    max_entries,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Maximum [1], sum [1] and weighted values [1, BLOCK_D] of one scaled query [1, BLOCK_D] over a chunk."""
    # Each row of a tile has a softmax of its own: nothing crosses threads in the loop but the channels of a score.
    row_max = tl.full((BLOCK_E,), NO_SCORE, tl.float32)
    row_sum = tl.zeros((BLOCK_E,), tl.float32)
    row_acc = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    # Not pipelined by the compiler: through shared memory a row would be spread over all warps.
    for tile in tl.range(first, last, BLOCK_E, num_stages=1):
        entry = tile + tl.arange(0, BLOCK_E)
        inside = (entry < last) & (entry != open_entry)
        slot = tl.load(table + entry // P, mask=inside, other=0).to(tl.int64) * P + entry % P
        k = _load_rows(k_ptr, slot, inside, D, BLOCK_D).to(tl.float32)
        v = _load_rows(v_ptr, slot, inside, D, BLOCK_D).to(tl.float32)
        score = tl.sum(k * q, 1)
        if k_scale_ptr is not None:
            score *= tl.load(k_scale_ptr + slot, mask=inside, other=0.0)
        if scores is not None:
            _keep_scores(scores, score[None, :], entry, inside, max_entries, 1, 1)
        score = tl.where(inside, score, NO_SCORE)
        new_max = tl.maximum(row_max, score)
        kept = tl.exp2(row_max - new_max)
        weight = tl.where(inside, tl.exp2(score - new_max), 0.0)
        row_sum = row_sum * kept + weight
        if v_scale_ptr is not None:
            weight *= tl.load(v_scale_ptr + slot, mask=inside, other=0.0)
        row_acc = row_acc * kept[:, None] + weight[:, None] * v
        row_max = new_max
    maximum = tl.max(row_max, 0, keep_dims=True)
    share = tl.exp2(row_max - maximum)
    total = tl.sum(row_sum * share, 0, keep_dims=True)
    return maximum, total, tl.sum(row_acc * share[:, None], 0, keep_dims=True)


@triton.jit
def _with_products(
    q,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    table,
    scores,
    first,
    last,
    open_entry,
    max_entries,
    score_scale,
    R: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Maxima [BLOCK_R], sums [BLOCK_R] and weighted values [BLOCK_R, BLOCK_D] of several queries over a chunk."""
    maximum = tl.full((BLOCK_R,), NO_SCORE, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in tl.range(first, last, BLOCK_E, num_stages=NUM_STAGES):
        entry = tile + tl.arange(0, BLOCK_E)
        inside = (entry < last) & (entry != open_entry)
        slot = tl.load(table + entry // P, mask=inside, other=0).to(tl.int64) * P + entry % P
        k = _load_rows(k_ptr, slot, inside, D, BLOCK_D)
        v = _load_rows(v_ptr, slot, inside, D, BLOCK_D)
        if k_scale_ptr is not None:
            # Numbers of 8 bits are exact in 16.
            k, v = k.to(tl.float32).to(q.dtype), v.to(tl.float32).to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * score_scale
        if k_scale_ptr is not None:
            score *= tl.load(k_scale_ptr + slot, mask=inside, other=0.0)[None, :]
        if scores is not None:
            _keep_scores(scores, score, entry, inside, max_entries, R, BLOCK_R)
        score = tl.where(inside[None, :], score, NO_SCORE)
        new_max = tl.maximum(maximum, tl.max(score, 1))
        kept = tl.exp2(maximum - new_max)
        weight = tl.where(inside[None, :], tl.exp2(score - new_max[:, None]), 0.0)
        total = total * kept + tl.sum(weight, 1)
        if v_scale_ptr is not None:
            weight *= tl.load(v_scale_ptr + slot, mask=inside, other=0.0)[None, :]
        acc = acc * kept[:, None] + tl.dot(weight.to(q.dtype), v, input_precision="ieee")
        maximum = new_max
    return maximum, total, acc


@triton.jit
def _with_open_entry(
    q,
    maximum,
    total,
    acc,
    k_ptr,
    v_ptr,
    scores,
    first,
    last,
    open_entry,
    max_entries,
    score_scale,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The same, with the entry that lies beside the blocks added if its place is in the chunk."""
    channel = tl.arange(0, BLOCK_D)
    entry = open_entry + tl.arange(0, 1)
    inside = (entry >= first) & (entry < last)
    k = tl.load(k_ptr + channel, mask=inside & (channel < D), other=0.0).to(tl.float32)
    v = tl.load(v_ptr + channel, mask=inside & (channel < D), other=0.0).to(tl.float32)
    score = tl.sum(q.to(tl.float32) * k[None, :], 1) * score_scale
    if scores is not None:
        _keep_scores(scores, score[:, None], entry, inside, max_entries, R, BLOCK_R)
    score = tl.where(inside, score, NO_SCORE)
    new_max = tl.maximum(maximum, score)
    kept, weight = tl.exp2(maximum - new_max), tl.where(inside, tl.exp2(score - new_max), 0.0)
    return new_max, total * kept + weight, acc * kept[:, None] + weight[:, None] * v[None, :]


@triton.jit(
    do_not_specialize=["num_head_caches", "num_kv_heads", "table_width"], do_not_specialize_on_alignment=OF_A_LAYER
)
def chunk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_open_ptr,
    v_open_ptr,
    open_entry_ptr,
    table_ptr,
    length_ptr,
    row_ptr,
    order_ptr,
    start_ptr,
    max_ptr,
    sum_ptr,
    acc_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_n,
    num_head_caches,
    num_kv_heads,
    table_width,
    score_scale,
    R: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    query = tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)
    query_mask = (query < R)[:, None] & (channel < D)[None, :]
    max_entries = table_width * P
    num_items = tl.load(start_ptr + num_head_caches)
    for item in tl.range(tl.program_id(0), num_items, tl.num_programs(0)):
        rank = _find(start_ptr, num_head_caches, item)
        head = tl.load(order_ptr + rank)
        sequence, kv_head = head // num_kv_heads, head % num_kv_heads
        row = sequence if row_ptr is None else tl.load(row_ptr + sequence)
        cache = row.to(tl.int64) * num_kv_heads + kv_head
        length = tl.load(length_ptr + cache)
        # The chunks of a head cache are equally long.
        num_chunks = tl.maximum(tl.cdiv(length, CHUNK), 1)
        chunk_entries = tl.cdiv(tl.cdiv(length, ALIGN), num_chunks) * ALIGN
        first = (item - tl.load(start_ptr + rank)) * chunk_entries
        last = tl.minimum(first + chunk_entries, length)
        # Lengths in the work list may have been too large.
        if first < last:
            q_rows = q_ptr + sequence.to(tl.int64) * q_stride_b + (kv_head * R + query[:, None]) * q_stride_n
            q = tl.load(q_rows + channel[None, :], mask=query_mask, other=0.0)
            open_entry = -1 if open_entry_ptr is None else tl.load(open_entry_ptr + cache)
            table = table_ptr + cache * table_width
            scores = None if scores_ptr is None else scores_ptr + head.to(tl.int64) * R * max_entries
            if BLOCK_R == 1:
                maximum, total, acc = _with_vectors(
                    q.to(tl.float32) * score_scale,
                    k_ptr,
                    v_ptr,
                    k_scale_ptr,
                    v_scale_ptr,
                    table,
                    scores,
                    first,
                    last,
                    open_entry,
                    max_entries,
                    D,
                    P,
                    BLOCK_D,
                    BLOCK_E,
                )
            else:
                maximum, total, acc = _with_products(
                    q,
                    k_ptr,
                    v_ptr,
                    k_scale_ptr,
                    v_scale_ptr,
                    table,
                    scores,
                    first,
                    last,
                    open_entry,
                    max_entries,
                    score_scale,
                    R,
                    D,
                    P,
                    BLOCK_R,
                    BLOCK_D,
                    BLOCK_E,
                    NUM_STAGES,
                )
            if open_entry_ptr is not None:
                maximum, total, acc = _with_open_entry(
                    q,
                    maximum,
                    total,
                    acc,
                    k_open_ptr + cache * D,
                    v_open_ptr + cache * D,
                    scores,
                    first,
                    last,
                    open_entry,
                    max_entries,
                    score_scale,
                    R,
                    D,
                    BLOCK_R,
                    BLOCK_D,
                )
            partial = item * R + query.to(tl.int64)
            tl.store(max_ptr + partial, maximum, mask=query < R)
            tl.store(sum_ptr + partial, total, mask=query < R)
            tl.store(acc_ptr + partial[:, None] * D + channel[None, :], acc, mask=query_mask)


@triton.jit(do_not_specialize=["num_kv_heads"], do_not_specialize_on_alignment=OF_A_LAYER)
def reduce_kernel(
    max_ptr,
    sum_ptr,
    acc_ptr,
    output_ptr,
    lse_ptr,
    length_ptr,
    row_ptr,
    order_ptr,
    start_ptr,
    num_kv_heads,
    R: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program adds the chunks of one query head."""
    rank, query = tl.program_id(0), tl.program_id(1)
    head = tl.load(order_ptr + rank).to(tl.int64)
    sequence, kv_head = head // num_kv_heads, head % num_kv_heads
    row = sequence if row_ptr is None else tl.load(row_ptr + sequence).to(tl.int64)
    length = tl.load(length_ptr + row * num_kv_heads + kv_head, mask=row >= 0, other=0)
    num_chunks = tl.cdiv(length, CHUNK)
    start = tl.load(start_ptr + rank).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    maximum = NO_SCORE
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_chunks, BLOCK_C):
        chunk = first + tl.arange(0, BLOCK_C)
        inside = chunk < num_chunks
        partial = (start + chunk) * R + query
        chunk_max = tl.load(max_ptr + partial, mask=inside, other=NO_SCORE)
        chunk_sum = tl.load(sum_ptr + partial, mask=inside, other=0.0)
        new_max = tl.maximum(maximum, tl.max(chunk_max, 0))
        kept, share = tl.exp2(maximum - new_max), tl.exp2(chunk_max - new_max)
        total = total * kept + tl.sum(chunk_sum * share, 0)
        acc = acc * kept + tl.sum(_load_rows(acc_ptr, partial, inside, D, BLOCK_D) * share[:, None], 0)
        maximum = new_max
    found = num_chunks > 0
    total = tl.where(found, total, 1.0)
    out = head * R + query  # the query heads of a KV head are neighbours
    tl.store(output_ptr + out * D + channel, acc / total, mask=channel < D)
    tl.store(lse_ptr + out, tl.where(found, (maximum + tl.log2(total)) * LN_2, float("-inf")))

"""Split attention on a GPU, against the bandwidth of its memory and against what others offer.

FlashAttention 3 and FlashInfer's xqa, where they can be imported, read the same blocks, each KV head as a sequence of
its own. ``scaled_dot_product_attention`` reads the same entries padded to the longest, as there is nothing else for
heads of different lengths. The clock covers launches captured in one CUDA graph, over layers enough that no entry comes
from a cache; our time includes the work list of the step.

Legend: L layers, B sequences, N query heads, G KV heads, R = N / G, D head dim, P entries per block, E entries.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks.gpu_caches import CACHE_OF_GPU, DTYPE, Caches, Deadline, Shape, gpu_seconds, make_caches
from examples.benchmarks.measure import Row
from megatron_dmc.ops.paged_attention import entry_slots, gather, work_list
from megatron_dmc.ops.paged_attention.work_list import CHUNK_SIZE

GOAL = 1 / 0.85
"""Time over that of a copy of the same bytes."""
GOAL_FROM_BATCH = 16
MODELS = {1: 32, 4: 8, 8: 8}
"""Query heads per KV head -> KV heads: Llama 2 7B, Llama 3 8B, and a wider group."""
HEADS_OF_BATCH = (512, 960, 1024, 3840, 32, 128)
"""Sequences times KV heads, the most telling first: FlashAttention 3 does not split more than 992."""
LARGEST_DIFFERENCE = 3e-2
"""Between two forms in bfloat16, whose outputs are means of numbers of order 1."""

Attend = Callable[[int], Tensor]
"""Attention output [B, N, D] of one layer."""
Peer = Callable[[list[Tensor], Caches], tuple[Attend, int]]
"""From queries and caches of all layers to a function that attends in one layer, and the number of layers it can."""


def attention_rows(options: argparse.Namespace, bandwidth: float, deadline: Deadline) -> Iterator[Row]:
    """Every model, batch, ratio and spread of lengths, until the deadline."""
    grid = itertools.product(HEADS_OF_BATCH, MODELS, (8.0, 1.0, 4.0), (1.0, 0.0, 0.5))
    for heads, group, ratio, sigma in grid:
        if deadline.passed:
            return
        shape = Shape(max(1, heads // MODELS[group]), MODELS[group], group, 128, 4096, ratio, sigma)
        yield from measure(shape, bandwidth, options, PEERS if ratio != 4.0 and sigma != 0.5 else {})


def quantised_rows(options: argparse.Namespace, bandwidth: float, deadline: Deadline) -> Iterator[Row]:
    """Entries in 8 bits."""
    for kv_dtype, group, heads in itertools.product(("int8", "fp8"), MODELS, (1024, 3840)):
        if deadline.passed:
            return
        shape = Shape(heads // MODELS[group], MODELS[group], group, 128, 4096, 8.0, 1.0, kv_dtype)
        yield from measure(shape, bandwidth, options, {})


def tuning_rows(options: argparse.Namespace, bandwidth: float, deadline: Deadline) -> Iterator[Row]:
    """Other sizes of tiles and chunks, one change at a time from what is chosen."""
    from megatron_dmc.ops.paged_attention.split_attention import tuning

    for group, kv_dtype, ratio in itertools.product(MODELS, ("auto", "fp8"), (8.0, 1.0)):
        shape = Shape(1024 // MODELS[group], MODELS[group], group, 128, 4096, ratio, 1.0, kv_dtype)
        caches, queries = make_caches(shape, options.device), random_queries(shape, options.device)
        chosen = tuning(group, 128, caches.kv.k_blocks.itemsize)
        changes = [{"programs": n} for n in range(2, 7)] + [{"num_warps": 8}, {"num_warps": 2}]
        changes += [{"block_e": n} for n in (16, 32, 64, 128)]
        changes += [{"num_stages": n} for n in (1, 2, 4, 5)] if group > 1 else []
        for change in [*changes, *({"chunk_size": n} for n in (128, 512, 1024))]:
            if deadline.passed:
                return
            sizes = chosen._replace(**{name: n for name, n in change.items() if name != "chunk_size"})
            try:
                chunk_size = change.get("chunk_size", CHUNK_SIZE)
                run = functools.partial(_attend, queries, caches, sizes=sizes, chunk_size=chunk_size)
                seconds, _ = gpu_seconds(run, options.repeats)
            except Exception as error:  # a size that does not fit is a result, too
                print(f"tuning {change}: {error}")
                continue
            ratio_to_copy = seconds / (caches.num_entries * shape.entry_bytes / bandwidth)
            conditions = {**shape.conditions(), "chosen": chosen._asdict(), "change": change}
            yield Row("tuning: time over that of a copy of its bytes", ratio_to_copy, "ratio", conditions)


def measure(shape: Shape, bandwidth: float, options: argparse.Namespace, peers: dict[str, Peer]) -> Iterator[Row]:
    """Time of ours against a copy, then against each peer that runs here and agrees."""
    caches, queries = make_caches(shape, options.device), random_queries(shape, options.device)
    num_layers, conditions = len(queries), shape.conditions()
    ours = _attend(queries, caches)
    some = _in_float32(queries[0][:2], caches)
    yield Row("attention: difference from float32", _difference(ours[0][:2], some), "1", conditions, LARGEST_DIFFERENCE)
    seconds, captured = gpu_seconds(lambda: _attend(queries, caches), options.repeats)
    conditions |= {"layers": num_layers, "entries": caches.num_entries, "captured": captured}
    yield Row("attention: time of a layer", 1e6 * seconds / num_layers, "us", conditions)
    of_copy = caches.num_entries * shape.entry_bytes / bandwidth
    goal = GOAL if shape.batch >= GOAL_FROM_BATCH else None
    yield Row("attention: time over that of a copy of its bytes", seconds / of_copy, "ratio", conditions, goal)
    for name, peer in peers.items():
        try:
            attend, num_attended = peer(queries, caches)
            difference = _difference(ours[0], attend(0))
            other, captured = gpu_seconds(functools.partial(_attend_with, attend, num_attended), options.repeats)
        except Exception as error:  # somebody else's code, on shapes it may not take
            print(f"{name}: {type(error).__name__}: {error}"[:300])
            continue
        conditions = {**conditions, "captured": captured, "difference": difference}
        if difference > LARGEST_DIFFERENCE:
            print(f"{name} computes something else: {difference}")
            continue
        ratio = (seconds / num_layers) / (other / num_attended)
        yield Row(f"attention: ours / {name}: time", ratio, "ratio", conditions, goal=1.0)


def _attend_with(attend: Attend, num_layers: int) -> list[Tensor]:
    return [attend(layer) for layer in range(num_layers)]


def random_queries(shape: Shape, device: str) -> list[Tensor]:
    """[B, N, D] for each layer."""
    num_layers = len(shape.lengths(device))
    heads = shape.num_kv_heads * shape.group
    return [torch.randn(shape.batch, heads, shape.head_dim, device=device).to(DTYPE) for _ in range(num_layers)]


def _attend(queries: list[Tensor], caches: Caches, *, sizes: Any = None, chunk_size: int = CHUNK_SIZE) -> list[Tensor]:
    from megatron_dmc.ops.paged_attention.split_attention import attend

    work = work_list(caches.length_LBG, chunk_size)
    outputs = []
    for layer, q_BND in enumerate(queries):
        outputs.append(attend(q_BND, *caches.of_layer(layer), work=work.of_layer(layer), sizes=sizes)[0])
    return outputs


def _in_float32(q_BND: Tensor, caches: Caches) -> Tensor:
    """Attention of the first sequences of the first layer, by torch operations."""
    kv, table_BGM, length_BG = caches.of_layer(0)
    some = slice(len(q_BND))
    if not kv.quantised:
        # Their blocks alone, or the whole pool would be copied.
        blocks = table_BGM[some].flatten().long()
        kv = kv._replace(k_blocks=kv.k_blocks[blocks].float(), v_blocks=kv.v_blocks[blocks].float())
        table_BGM = torch.arange(len(blocks), device=blocks.device).view_as(table_BGM[some])
    return gather.paged_attention(q_BND.float(), kv.of_rows(some), table_BGM[some], length_BG[some])


def _difference(found: Tensor, expected: Tensor) -> float:
    return (found.float() - expected.float()).abs().nan_to_num(nan=float("inf")).max().item()


def _padded(queries: list[Tensor], caches: Caches) -> tuple[Attend, int]:
    """Stock attention over as many layers as no cache holds, each entry gathered beforehand."""
    _, num_sequences, num_kv_heads = caches.length_LBG.shape
    longest = int(caches.length_LBG.max())
    layer_bytes = 2 * 2 * num_sequences * num_kv_heads * longest * caches.kv.head_dim
    num_layers = max(1, min(len(queries), CACHE_OF_GPU // layer_bytes))
    padded = []
    for layer in range(num_layers):
        kv, table_BGM, length_BG = caches.of_layer(layer)
        entry_E = torch.arange(longest, device=table_BGM.device)
        filled_BGE = entry_E < length_BG.unsqueeze(-1)
        slot_BGE = entry_slots(table_BGM, torch.where(filled_BGE, entry_E, 0), kv.block_size)
        k, v = (blocks.flatten(0, 1)[slot_BGE] for blocks in (kv.k_blocks, kv.v_blocks))
        padded.append((queries[layer].unflatten(1, (num_kv_heads, -1)), k, v, filled_BGE.unsqueeze(2)))

    def attend(layer: int) -> Tensor:
        q_BGRD, k_BGED, v_BGED, mask = padded[layer]
        return F.scaled_dot_product_attention(q_BGRD, k_BGED, v_BGED, attn_mask=mask).flatten(1, 2)

    return attend, num_layers


def _flash_attention_3(queries: list[Tensor], caches: Caches) -> tuple[Attend, int]:
    """Blocks of any size, lengths on the device; splits each sequence by its own length up to 992 of them."""
    interface = _first_of("flash_attn_interface", "fa3_fwd_interface")

    def attend(layer: int) -> Tensor:
        kv, table_BGM, length_BG = caches.of_layer(layer)
        output = interface.flash_attn_with_kvcache(
            queries[layer].unflatten(1, (length_BG.shape[1], -1)).flatten(0, 1).unsqueeze(1),
            kv.k_blocks.unsqueeze(2),
            kv.v_blocks.unsqueeze(2),
            cache_seqlens=length_BG.flatten(),
            page_table=table_BGM.flatten(0, 1),
            num_splits=0,
        )
        return output.view_as(queries[layer])

    return attend, len(queries)


def _xqa(queries: list[Tensor], caches: Caches) -> tuple[Attend, int]:
    """Splits all sequences alike, by how many there are."""
    decode = importlib.import_module("flashinfer.decode").xqa_batch_decode_with_kv_cache
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=caches.length_LBG.device)

    def attend(layer: int) -> Tensor:
        kv, table_BGM, length_BG = caches.of_layer(layer)
        output = decode(
            query=queries[layer].unflatten(1, (length_BG.shape[1], -1)).flatten(0, 1),
            kv_cache=(kv.k_blocks.unsqueeze(2), kv.v_blocks.unsqueeze(2)),
            workspace_buffer=workspace,
            block_tables=table_BGM.flatten(0, 1),
            seq_lens=length_BG.flatten().to(torch.uint32),
            max_seq_len=table_BGM.shape[-1] * kv.block_size,
            bmm1_scale=kv.head_dim**-0.5,
        )
        return output.view_as(queries[layer])

    return attend, len(queries)


def _first_of(*modules: str) -> Any:
    for name in modules[:-1]:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return importlib.import_module(modules[-1])


PEERS: dict[str, Peer] = {
    "scaled_dot_product_attention": _padded,
    "flash-attention 3 per head": _flash_attention_3,
    "flashinfer xqa": _xqa,
}

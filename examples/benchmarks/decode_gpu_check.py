"""Whether the kernels of decoding are right on this device: steps in the cache and attention, beside torch operations.

Every check decodes a few steps twice from the same caches: with the kernels, and on the CPU with the forms that the
tests compare with the plain ones. Long and short head caches, and sequences that are not there, are among them.

Legend: B sequences, A rows of the cache, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.gpu_caches import Shape, make_caches
from examples.benchmarks.measure import Row
from megatron_dmc.ops.cache_update import HeadCaches, Merging, NewTokens, one_step, state_shape
from megatron_dmc.ops.kv_quantization import KV_FORMATS, dequantise
from megatron_dmc.ops.paged_attention import gather, work_list
from megatron_dmc.ops.paged_kv import PagedKV
from megatron_dmc.ops.rope import cos_sin, inverse_frequencies

ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Largest difference of numbers of order 1, see tests/tolerances.py."""
STEP_8_BITS = {"int8": 1 / 127, "fp8": 2**-3}
"""A number that lies on the border of two stored ones may become either: one step, of the largest of its entry."""
LARGEST_NUMBER = 4.0
"""Of normal ones, about."""
NUM_STEPS = 3


@dataclass(frozen=True)
class Check:
    """One combination. ``window_size`` None appends every token."""

    shape: Shape
    dtype: torch.dtype
    window_size: int | None
    chunk_size: int

    @property
    def merging(self) -> Merging | None:
        """Decisions on both sides."""
        return None if self.window_size is None else Merging(0.3, 0.0, 1e-6, self.window_size)


def checks(device: str) -> Iterator[Check]:
    """A few of the smallest on a CPU, where an interpreter runs the kernels.

    On a GPU every kind of kernel; the tests run the whole matrix in the interpreter, and compiling it takes too long.
    """
    if device == "cpu":
        for group, kv_dtype, window_size in ((1, "auto", 0), (2, "int8", 3), (1, "int8", None)):
            shape = Shape(2, 2, group, 16, 24, sigma=1.0, kv_dtype=kv_dtype, block_size=8, num_layers=1)
            yield Check(shape, torch.float32, window_size, chunk_size=16)
        return
    shapes = ((1, 128, 32), (3, 64, 16), (4, 80, 64), (8, 128, 32))
    windows = itertools.cycle((0, None, 12, 0, 12, None, 12))
    for dtype in ALLOWED:
        for group, head_dim, block_size in shapes if dtype == torch.bfloat16 else shapes[::3]:
            for kv_dtype in KV_FORMATS:
                shape = Shape(3, 2, group, head_dim, 700, 2.0, 1.0, kv_dtype, block_size, num_layers=1)
                yield Check(shape, dtype, next(windows), chunk_size=256)


def check_rows(device: str) -> Iterator[Row]:
    """One row for each kind of numbers: the largest error over what is allowed, of all that was compared."""
    worst: dict[str, tuple[float, dict[str, Any]]] = {}
    for check in checks(device):
        for name, error in run(check, device).items():
            kind = f"{name}, {str(check.dtype).removeprefix('torch.')}, entries as {check.shape.kv_dtype}"
            if error >= worst.get(kind, (0.0, {}))[0]:
                conditions = {"dtype": str(check.dtype), "window_size": check.window_size}
                worst[kind] = (error, check.shape.conditions() | conditions)
    for kind, (error, conditions) in worst.items():
        yield Row(f"check: {kind}: error over allowed", error, "ratio", conditions, goal=1.0)


def run(check: Check, device: str) -> dict[str, float]:
    """Largest errors over what is allowed; infinite where something is not a number."""
    from megatron_dmc.ops.cache_update import kernels
    from megatron_dmc.ops.paged_attention import split_attention

    expected = _caches(check)
    found = _map(expected, lambda x: x.to(device, copy=True))
    # The last sequence of a batch is none for the kernels.
    rows_B = torch.arange(check.shape.batch - 1)
    some_rows_B = torch.cat((rows_B, torch.tensor([-1]))).to(device)
    errors: dict[str, float] = {}
    for step in range(NUM_STEPS):
        tokens = _tokens(check, step)
        settings = {"merging": check.merging, "neuron_scale": 0.0 if check.merging else 1.0}
        q_BND, accumulate_BG = kernels.update_caches(
            _map(tokens, lambda x: x.to(device)), found, some_rows_B, **settings
        )
        there = NewTokens(*(x[:-1] for x in tokens))
        expected_q, expected_accumulate = one_step.update_caches(there, expected, rows_B, **settings)
        work = work_list(
            found.cache_seqlens_AG[some_rows_B].masked_fill((some_rows_B < 0)[:, None], 0), check.chunk_size
        )
        attended = (q_BND, found.kv, found.block_table_AGM, found.cache_seqlens_AG)
        output, _, _ = split_attention.attend(*attended, rows_B=some_rows_B, work=work)
        here = _map(found, lambda x: x.cpu())
        comparisons = {
            "decisions": (accumulate_BG[:-1].float(), expected_accumulate.float(), 0.5),
            "lengths": (here.cache_seqlens_AG.float(), expected.cache_seqlens_AG.float(), 0.5),
            "queries": (q_BND[:-1], expected_q, ALLOWED[check.dtype]),
            "attention": (output[:-1], _attention(q_BND.cpu()[:-1], here, rows_B), ALLOWED[check.dtype]),
            **_memory(check, here, expected),
        }
        for name, (x, y, allowed) in comparisons.items():
            errors[name] = max(errors.get(name, 0.0), _error(x, y) / allowed)
    return errors


def _caches(check: Check) -> HeadCaches:
    """On the CPU, with room for all steps; every second head has an open entry where the pool is in 8 bits."""
    caches = make_caches(check.shape, "cpu", spare_entries=NUM_STEPS, dtype=check.dtype)
    kv, table, length = caches.of_layer(0)
    if kv.open_entry_BG is not None and check.merging is not None:
        kv.open_entry_BG.copy_(length - 1)
    elif kv.quantised:
        kv = kv._replace(k_open=None, v_open=None, open_entry_BG=None)
    state = None
    if check.merging is not None:
        shape = state_shape(check.shape.head_dim, check.merging.window_size)
        # Weights, the last number of each, are positive.
        state = torch.randn(*length.shape, *shape, generator=torch.Generator().manual_seed(1))
        state[..., -1] = state[..., -1].abs() + 0.5
    return HeadCaches(kv, table, length, state)


def _tokens(check: Check, step: int) -> NewTokens:
    shape, generator = check.shape, torch.Generator().manual_seed(10 + step)
    heads = (shape.num_kv_heads * shape.group, shape.num_kv_heads, shape.num_kv_heads)
    qkv = torch.randn(shape.batch, sum(heads), shape.head_dim, generator=generator).to(check.dtype)
    position_B = shape.context + step + torch.arange(shape.batch)
    return NewTokens(
        *qkv.split(heads, dim=1), position_B, *cos_sin(position_B, inverse_frequencies(shape.head_dim, 1e4))
    )


def _map(tensors: Any, change: Any) -> Any:
    """Nested named tuples with ``change`` applied to every tensor."""
    if tensors is None:
        return None
    return change(tensors) if isinstance(tensors, Tensor) else type(tensors)(*(_map(x, change) for x in tensors))


def _attention(q_BND: Tensor, caches: HeadCaches, rows_B: Tensor) -> Tensor:
    """In float32, of the entries as they are."""
    kv = caches.kv.of_rows(rows_B)
    if not kv.quantised:
        kv = PagedKV(kv.k_blocks.float(), kv.v_blocks.float())
    return gather.paged_attention(q_BND.float(), kv, caches.block_table_AGM[rows_B], caches.cache_seqlens_AG[rows_B])


def _memory(check: Check, found: HeadCaches, expected: HeadCaches) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Blocks, open entries and sums after a step."""
    allowed = ALLOWED[check.dtype]
    (k_found, v_found), (k_expected, v_expected) = _stored(found.kv), _stored(expected.kv)
    step = STEP_8_BITS.get(check.shape.kv_dtype, 0.0) * LARGEST_NUMBER
    memory = {"keys": (k_found, k_expected, allowed + step), "values": (v_found, v_expected, allowed + step)}
    if found.kv.k_open is not None and expected.kv.k_open is not None:
        memory["open entries"] = (found.kv.k_open, expected.kv.k_open, allowed)
    if found.state is not None and expected.state is not None:
        memory["sums"] = (found.state, expected.state, ALLOWED[torch.float32])
    return memory


def _stored(kv: PagedKV) -> list[Tensor]:
    if kv.k_scale is None or kv.v_scale is None:
        return [kv.k_blocks, kv.v_blocks]
    pairs = ((kv.k_blocks, kv.k_scale), (kv.v_blocks, kv.v_scale))
    return [dequantise(blocks, scale, torch.float32) for blocks, scale in pairs]


def _error(found: Tensor, expected: Tensor) -> float:
    difference = (found.cpu().float() - expected.cpu().float()).abs()
    return difference.nan_to_num(nan=float("inf")).max().item()

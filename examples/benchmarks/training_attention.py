"""Attention of DMC, forward and backward, against stock causal attention with RoPE; and pooling alone.

The two sides get the same inputs, projections before RoPE as Megatron hands them over: q [S, 1, N, D], k and v
[S, 1, G, D]. Ours draws noise, takes decisions, pools, rotates and attends; stock rotates and calls
``scaled_dot_product_attention``. Run as a module, this file measures the peak memory of one side.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.benchmarks.measure import (
    Row,
    growth_exponent,
    median_ratio,
    peak_bytes_in_new_process,
    print_peak_bytes,
    timed,
)
from megatron_dmc.config import DMCConfig
from megatron_dmc.methods import DMC
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.kv_pooling import pool_kv
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.ops.rope import apply_rope, inverse_frequencies

LENGTHS = (512, 1024, 2048, 4096, 8192)
HEADS = {"MHA": (8, 8), "GQA": (8, 2)}
GOAL_FROM_LENGTH = 4096
TIME_GOAL = {"cpu": 1.35, "cuda": 1.2}
MEMORY_GOAL = 1.4
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """Sizes of one comparison."""

    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    device: str = "cpu"

    def inputs(self) -> list[Tensor]:
        """q, k and v, and the gradient of the output."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        kind = {"device": self.device, "dtype": DTYPE[self.device]}
        tensors = [torch.randn(self.length, 1, h, self.head_dim, generator=generator, **kind) for h in heads]
        tensors[1][..., -1] += DMCConfig.decision_bias  # decisions on both sides of 0
        return [*(x.requires_grad_() for x in tensors[:3]), tensors[3]]

    def geometry(self) -> Geometry:
        """One sequence from position 0."""
        return Geometry(self.length, 1, inverse_frequencies(self.head_dim, 10000.0).to(self.device))


def stock(shape: Shape) -> Callable[[], None]:
    """Forward and backward of RoPE and causal attention as torch offers it."""
    q, k, v, grad = shape.inputs()
    cos, sin = (x[:, None, None] for x in shape.geometry().cos_sin_S)

    def run() -> None:
        rotated = (apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)
        heads_first = (x.permute(1, 2, 0, 3) for x in rotated)
        output = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        torch.autograd.grad(output, (q, k, v), grad.permute(1, 2, 0, 3))

    return run


def ours(shape: Shape) -> Callable[[], None]:
    """Forward and backward of the whole operation of DMC in training."""
    q, k, v, grad = shape.inputs()
    geometry, method = shape.geometry(), DMC(DMCConfig())
    sequence, positions = (torch.arange(n, device=shape.device) for n in (1, shape.length))

    def noise(num_heads: int) -> Tensor:
        return logistic_noise(0, 0, sequence, 0, torch.arange(num_heads, device=shape.device), positions)

    def run() -> None:
        output, _ = method.whole(q, k, v, geometry, noise=noise)
        torch.autograd.grad(output, (q, k, v), grad)

    return run


SIDES = {"stock": stock, "dmc": ours}


def attention_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Time and memory ratios at each size, then how each grows."""
    for device in _devices():
        for kind, (num_heads, num_kv_heads) in HEADS.items():
            for head_dim in (64, 128):
                shapes = [
                    Shape(length, num_heads, num_kv_heads, head_dim, device)
                    for length in LENGTHS
                    if length <= options.max_length
                ]
                yield from _compare(shapes, kind, options.repeats)


def _compare(shapes: list[Shape], kind: str, repeats: int) -> Iterator[Row]:
    growth: dict[str, list[float]] = {name: [] for name in ("stock seconds", "dmc seconds", "dmc bytes")}
    conditions = {"heads": kind, **dataclasses.asdict(shapes[0]), "dtype": str(DTYPE[shapes[0].device])}
    for shape in shapes:
        conditions["length"] = shape.length
        has_goal = shape.length >= GOAL_FROM_LENGTH
        seconds = timed({name: side(shape) for name, side in SIDES.items()}, repeats, shape.device)
        for name in SIDES:
            median = statistics.median(seconds[name])
            growth[f"{name} seconds"].append(median)
            yield Row(f"attention, {name}: time", 1000 * median, "ms", dict(conditions))
        ratio = median_ratio(seconds, "dmc", "stock")
        goal = TIME_GOAL[shape.device] if has_goal else None
        yield Row("attention, dmc / stock: time", ratio, "ratio", dict(conditions), goal)
        peaks = {name: _peak_bytes(name, shape) for name in SIDES}
        growth["dmc bytes"].append(peaks["dmc"])
        for name, peak in peaks.items():
            yield Row(f"attention, {name}: peak memory", peak / 2**20, "MiB", dict(conditions))
        ratio = peaks["dmc"] / peaks["stock"]
        goal = MEMORY_GOAL if has_goal else None
        yield Row("attention, dmc / stock: peak memory", ratio, "ratio", dict(conditions), goal)
    conditions["length"] = [shape.length for shape in shapes]
    for name, values in growth.items():
        if len(values) > 1:
            exponent = growth_exponent(conditions["length"], values)
            yield Row(f"attention, {name}: growth with length", exponent, "power", dict(conditions))


def pooling_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Pooling, forward and backward, against reading its inputs and writing its outputs once."""
    for device in _devices():
        for window_size in (0, 12):
            shapes = [Shape(length, 8, 8, 64, device) for length in LENGTHS if length <= options.max_length]
            medians = []
            for shape in shapes:
                conditions = {**dataclasses.asdict(shape), "window_size": window_size, "dtype": str(DTYPE[device])}
                runs = _pooling_runs(shape, window_size)
                seconds = timed(runs, options.repeats, device)
                medians.append(statistics.median(seconds["forward"]) + statistics.median(seconds["backward"]))
                for name in ("forward", "backward"):
                    yield Row(f"pooling {name}: time", 1000 * statistics.median(seconds[name]), "ms", conditions)
                    ratio = median_ratio(seconds, name, f"{name} copies")
                    yield Row(f"pooling {name} / reading and writing once: time", ratio, "ratio", conditions)
            if len(shapes) > 1:
                lengths = [shape.length for shape in shapes]
                conditions = {**conditions, "length": lengths}
                yield Row("pooling: growth with length", growth_exponent(lengths, medians), "power", conditions)


def _pooling_runs(shape: Shape, window_size: int) -> dict[str, Callable[[], object]]:
    _, k, v, _ = shape.inputs()
    alpha = torch.rand(k.shape[:-1], device=shape.device)
    alpha[0] = 0
    omega = torch.rand_like(alpha) + 0.1
    leaves = (k, v, alpha.requires_grad_(), omega.requires_grad_())
    pooled = pool_kv(*leaves, window_size)
    grads = [torch.ones_like(x) for x in pooled]
    moved = [x.detach() for x in leaves]

    def forward() -> None:
        with torch.no_grad():
            pool_kv(*leaves, window_size)

    return {
        "forward": forward,
        "forward copies": lambda: [x.clone() for x in moved],
        "backward": lambda: torch.autograd.grad(pooled, leaves, grads, retain_graph=True),
        # Reads keys, values and their gradients, writes two gradients; the scalars count little.
        "backward copies": lambda: [torch.add(x, g) for x, g in zip(moved[:2], grads, strict=True)],
    }


def _devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _peak_bytes(side: str, shape: Shape) -> int:
    """Peak memory of inputs, output and everything between, in bytes."""
    if shape.device == "cuda":
        run = SIDES[side](shape)
        run()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    sizes = [str(x) for x in (shape.length, shape.num_heads, shape.num_kv_heads, shape.head_dim)]
    return peak_bytes_in_new_process("examples.benchmarks.training_attention", [side, *sizes])


def main(side: str, *sizes: str) -> None:
    """Print the peak memory of one side on the CPU."""
    shape = Shape(*(int(size) for size in sizes))
    small = dataclasses.replace(shape, length=8)
    print_peak_bytes(lambda: SIDES[side](shape), SIDES[side](small))


if __name__ == "__main__":
    main(*sys.argv[1:])

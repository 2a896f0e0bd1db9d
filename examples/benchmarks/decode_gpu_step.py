"""Whole steps of decoding on a GPU: a random model of the shape of Llama 2 7B, its caches as full as asked.

The model is the decoder of inference, attention works in place, and a step ends with the greedy token of each sequence.
In the clock of a captured step nothing of the host is but its launch. What a step must read once, weights and entries,
at the bandwidth of a copy is its roofline.

Legend: L layers, B sequences, G KV heads, D head dim.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from examples.benchmarks.gpu_caches import DTYPE, Caches, Deadline, Shape, make_caches
from examples.benchmarks.measure import Row, synchronize
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.cuda_graphs import CapturedSteps
from megatron_dmc.inference.decoder.decoder import Decoder
from megatron_dmc.inference.decoder.in_place import InPlaceAttention
from megatron_dmc.methods import DMC, Dense
from megatron_dmc.methods.base import Method
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.tensors import by_hf_name
from megatron_dmc.ops.cache_update import HeadCaches, state_shape

LLAMA_2_7B = ModelConfig(
    hidden_size=4096,
    num_layers=32,
    num_attention_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_hidden_size=11008,
    vocab_size=32000,
    max_position_embeddings=4096,
)
STEP_GOAL = 1 / 0.75
"""Time of a step over its roofline."""
RATIO_GOAL = 1 / 7
"""Tokens per second at ratio 1 over those at ratio 8, memory full."""
RESERVE = 8 << 30
"""Bytes left for what a step computes, for graphs and for partial results."""
NUM_STEPS = 16


class RandomModel:
    """Weights of the right shapes, made where they are used; what the decoder asks of a checkpoint."""

    def __init__(self, config: ModelConfig, dmc: DMCConfig | None, device: str) -> None:
        self.config, self.dmc, self._device = config, dmc, device

    def tensor(self, name: str) -> Tensor:
        """Normal, and small enough for the hidden states to stay numbers."""
        entry, place = by_hf_name(self.config)[name]
        shape = entry.hf_shapes(self.config)[place]
        return torch.empty(shape, dtype=DTYPE, device=self._device).normal_(std=0.02)


def random_model(config: ModelConfig, device: str) -> Decoder:
    """A model that answers nothing, in the time of a real one."""
    return Decoder(RandomModel(config, None, device), device=device)  # type: ignore[arg-type]


def step_rows(options: argparse.Namespace, bandwidth: float, deadline: Deadline) -> Iterator[Row]:
    """Single streams, equal batches, and as many sequences as there is room for, with and without compression."""
    model = random_model(LLAMA_2_7B, options.device)
    compressed = options.synthetic_cr
    throughput: dict[float, float] = {}
    for ratio, batch in ((compressed, None), (1.0, None), (compressed, 16), (1.0, 16), (compressed, 1), (1.0, 1)):
        if deadline.passed:
            return
        shape = _shape(LLAMA_2_7B, ratio, options.sigma, batch or _sequences_that_fit(ratio, options.sigma))
        for row, tokens_per_second in measure(model, shape, bandwidth):
            yield row
            if batch is None and tokens_per_second:
                throughput[ratio] = tokens_per_second
        if batch is None and len(throughput) == 2:
            slower = throughput[1.0] / throughput[compressed]
            goal = RATIO_GOAL if compressed == 8 else None
            name = f"memory full, ratio 1 / {compressed:g}: tokens per second"
            yield Row(name, slower, "ratio", shape.conditions(), goal)


def _shape(config: ModelConfig, ratio: float, sigma: float, batch: int) -> Shape:
    group = config.num_attention_heads // config.num_kv_heads
    sizes = (batch, config.num_kv_heads, group, config.head_dim, config.max_position_embeddings)
    return Shape(*sizes, ratio, 0.0 if ratio == 1 else sigma, num_layers=config.num_layers)


def _sequences_that_fit(ratio: float, sigma: float) -> int:
    free, _ = torch.cuda.mem_get_info()
    shape = _shape(LLAMA_2_7B, ratio, sigma, 1)
    # Each head holds half a block more than it needs on average, and one to go on.
    entries = shape.context / ratio + 1.5 * shape.block_size
    sums = 4 * (2 * shape.head_dim + 1)
    return int((free - RESERVE) / (LLAMA_2_7B.num_layers * shape.num_kv_heads * (entries * shape.entry_bytes + sums)))


def measure(model: Decoder, shape: Shape, bandwidth: float) -> Iterator[tuple[Row, float | None]]:
    """Rows of one batch, with the tokens per second of captured steps."""
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    method: Method = Dense() if shape.compression_ratio == 1 else DMC(DMCConfig(decision_bias=0.0))
    caches = make_caches(shape, str(model.device), spare_entries=2 * NUM_STEPS + 8)
    roofline = (_weight_bytes(model) + caches.num_entries * shape.entry_bytes) / bandwidth
    step = make_step(model, method, shape, caches)
    inputs = [torch.arange(shape.batch, device=model.device) for _ in range(3)]
    inputs[2] = torch.full_like(inputs[0], shape.context)
    entries = caches.num_entries
    for name, run in (("eager", step), ("captured", None)):
        try:
            run = run or CapturedSteps(step, [shape.batch], model.device)
            seconds = _seconds_of_steps(run, inputs)
        except RuntimeError as error:
            print(f"{name} steps of {shape.batch} sequences: {error}"[:300])
            continue
        conditions = {**shape.conditions(), "entries": entries, "steps": name, "method": method.name}
        if model.device.type == "cuda":
            conditions["peak memory, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        yield Row("step: time", 1000 * seconds, "ms", conditions), None
        yield Row("step: tokens per second", shape.batch / seconds, "1/s", conditions), None
        goal = STEP_GOAL if name == "captured" else None
        rate = shape.batch / seconds if name == "captured" else None
        yield Row("step: time over its roofline", seconds / roofline, "ratio", conditions, goal), rate


def make_step(
    model: Decoder, method: Method, shape: Shape, caches: Caches
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Greedy tokens [B] from tokens, rows and positions."""
    states: list[Any] = [None] * len(caches.length_LBG)
    if method.merging is not None:
        size = state_shape(shape.head_dim, method.merging.window_size)
        states = [torch.ones(*caches.length_LBG.shape[1:], *size, device=model.device) for _ in states]
    layers = [HeadCaches(*caches.of_layer(layer), state) for layer, state in enumerate(states)]

    def step(token_B: Tensor, row_B: Tensor, position_B: Tensor) -> Tensor:
        attention = InPlaceAttention(method, layers, caches.length_LBG, row_B, position_B, model.inverse_frequencies)
        return model.logits(model.step(token_B, attention)).argmax(-1)

    return step


def _seconds_of_steps(run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor]) -> float:
    """Median of steps, each waited for."""
    seconds = []
    for _ in range(NUM_STEPS):
        synchronize(inputs[0].device.type)
        start = time.perf_counter()
        run(*inputs)
        synchronize(inputs[0].device.type)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def _weight_bytes(model: Decoder) -> int:
    """All that a step reads: every matrix but the table of input embeddings."""
    layers = [x for layer in model.layers for x in vars(layer).values() if x is not None]
    return sum(x.nbytes for x in (*layers, model.final_norm, model.output))

"""Memory said before it is spent: weights, cache and workspace of a model, beside what a machine has.

Estimates are of what is expected: a cache at the ratio that its model was trained for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_dmc.inference.cache.paged_kv_cache import CacheShape
from megatron_dmc.methods.base import Method
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.support.memory import available_memory
from megatron_dmc.support.units import binary_bytes

DEFAULT_MEMORY_FRACTION = 0.9
BLOCKS_BESIDE = 2
"""Of every head, which admission keeps free for the next token."""
LOGIT_BYTES = 32
"""Of one logit while its token is chosen: raw and penalised, sorted with places, probabilities and their sums."""
TOKEN_COPIES = 6
"""Times that queries, keys and values of a pass exist in float32 at once: rotated, pooled, in parts, merged."""


class DeviceMemory(NamedTuple):
    """Bytes of the place where a model computes."""

    available: int
    total: int

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """What is there now."""
        if device.type == "cuda":
            return cls(*torch.cuda.mem_get_info(device))
        available = available_memory()
        return cls(available, available)


@dataclass(frozen=True)
class Need:
    """Bytes that a model needs at work."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.workspace

    def __str__(self) -> str:
        weights, cache, workspace = map(binary_bytes, (self.weights, self.cache, self.workspace))
        return f"{binary_bytes(self.total)} ({weights} of weights, {cache} of cache, {workspace} of workspace)"

    def require(self, memory: DeviceMemory, remedy: str) -> None:
        """Compare with what there is.

        Raises:
            ValueError: it does not fit; ``remedy`` says what to lower.
        """
        if self.total > memory.available:
            raise ValueError(f"about {self} are needed, {binary_bytes(memory.available)} are free: {remedy}")


@dataclass(frozen=True)
class ModelMemory:
    """What a model takes, by its configuration alone.

    Args:
        config: of the model.
        dtype: of weights and cache.
        method: how the cache is kept.
        block_size: entries per block of the cache.
    """

    config: ModelConfig
    dtype: torch.dtype
    method: Method
    block_size: int

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return self.config.num_parameters * self.dtype.itemsize

    @property
    def cache_shape(self) -> CacheShape:
        """Of a cache for this model."""
        config = self.config
        state = self.method.state(config.head_dim)
        return CacheShape(config.num_layers, config.num_kv_heads, config.head_dim, self.dtype, state, self.block_size)

    def blocks(self, num_entries: float) -> int:
        """Blocks of a text that leaves so many entries in every head."""
        return self.config.num_layers * self.config.num_kv_heads * -int(-num_entries // self.block_size)

    def cache(self, lengths: Sequence[int], max_sequences: int) -> int:
        """Bytes of the cache of texts of ``lengths`` tokens, the longest ``max_sequences`` of them at once."""
        together = heapq.nlargest(max_sequences, lengths)
        blocks = sum(self.blocks(self.method.expected_entries(length)) for length in together)
        return blocks * self.cache_shape.block_bytes + self.state(max_sequences)

    def state(self, max_sequences: int) -> int:
        """Bytes of the method's state of so many sequences."""
        return max_sequences * self.config.num_layers * self.config.num_kv_heads * self.cache_shape.state_bytes

    def workspace(self, num_tokens: int, num_logits: int) -> int:
        """Bytes of a pass over ``num_tokens`` tokens, ``num_logits`` of which are followed by a new one."""
        config = self.config
        heads = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
        projected = self.dtype.itemsize * (3 * config.hidden_size + 4 * config.ffn_hidden_size + heads)
        wide = torch.float32.itemsize * (2 * config.hidden_size + TOKEN_COPIES * heads)
        return num_tokens * (projected + wide) + num_logits * config.vocab_size * LOGIT_BYTES

    def pool(
        self, workspace: int, lengths: Sequence[int], max_sequences: int, memory: DeviceMemory, fraction: float
    ) -> int:
        """Blocks of a cache of fixed size, not many more than the texts need without compression.

        Args:
            workspace: see :meth:`workspace`.
            lengths, max_sequences: see :meth:`cache`.
            memory: of the device, before the weights are there.
            fraction: share of the device that this process may fill, beside what others hold.

        Raises:
            ValueError: the longest text does not fit.
        """
        fixed = Need(self.weights, self.state(max_sequences), workspace)
        left = int(fraction * memory.total) - (memory.total - memory.available) - fixed.total
        blocks = max(0, left) // self.cache_shape.block_bytes
        longest = self.blocks(self.method.expected_entries(max(lengths)))
        if blocks < longest:
            need = Need(fixed.weights, fixed.cache + longest * self.cache_shape.block_bytes, workspace)
            raise ValueError(
                f"about {need} are needed for one text of {max(lengths):,} tokens, --memory-fraction {fraction:g} "
                f"leaves {binary_bytes(max(0, left + fixed.total))} of the device: raise it, shorten the text, lower "
                "--max-sequences or --prefill-chunk, or take --dtype bfloat16"
            )
        beside = BLOCKS_BESIDE * self.block_size
        return min(blocks, sum(self.blocks(length + beside) for length in heapq.nlargest(max_sequences, lengths)))

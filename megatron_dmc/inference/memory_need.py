"""Memory said before it is spent: weights, cache and workspace of a model, beside what a machine has.

Estimates are of what is expected: a cache at the ratio that its model was trained for.
"""

from __future__ import annotations

import math
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

    def require(self, memory: DeviceMemory, remedy: str) -> str:
        """Compare with what there is.

        Returns:
            Both, in a line for people.

        Raises:
            ValueError: it does not fit; ``remedy`` says what to lower.
        """
        if self.total > memory.available:
            raise ValueError(f"about {self} are needed, {binary_bytes(memory.available)} are free: {remedy}")
        return f"memory: about {self} of {binary_bytes(memory.available)}"


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
        """Bytes of all parameters; an embedding that is also the output is there twice on a CPU."""
        config = self.config
        copied = config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0
        return (config.num_parameters + copied) * self.dtype.itemsize

    @property
    def shape(self) -> CacheShape:
        """Of a cache for this model."""
        return CacheShape(
            num_layers=self.config.num_layers,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            dtype=self.dtype,
            state=self.method.state(self.config.head_dim),
            block_size=self.block_size,
        )

    def blocks(self, num_entries: float) -> int:
        """Blocks of a text that leaves so many entries in every head."""
        return self.shape.num_heads * math.ceil(num_entries / self.block_size)

    def cache(self, lengths: Sequence[int]) -> int:
        """Bytes of the cache of texts of ``lengths`` tokens at once, at the ratio that is expected."""
        return self.pool(sum(self.blocks(self.method.expected_entries(length)) for length in lengths), len(lengths))

    def pool(self, num_blocks: int, max_sequences: int) -> int:
        """Bytes of so many blocks, and of the method's state of so many sequences."""
        state = max_sequences * self.shape.num_heads * self.shape.state_bytes
        return num_blocks * self.shape.block_bytes + state

    def workspace(self, num_tokens: int, num_logits: int) -> int:
        """Bytes of a pass over ``num_tokens`` tokens, ``num_logits`` of which are followed by a new one."""
        config = self.config
        heads = (config.num_attention_heads + 2 * config.num_kv_heads) * config.head_dim
        projected = self.dtype.itemsize * (3 * config.hidden_size + 4 * config.ffn_hidden_size + heads)
        wide = torch.float32.itemsize * (2 * config.hidden_size + TOKEN_COPIES * heads)
        return num_tokens * (projected + wide) + num_logits * config.vocab_size * LOGIT_BYTES

    def num_blocks(self, workspace: int, lengths: Sequence[int], least: int, memory: DeviceMemory, share: float) -> int:
        """The size of a pool: what the texts could need without compression, as far as there is memory.

        Args:
            workspace: see :meth:`workspace`.
            lengths: tokens of the texts that may be there at once.
            least: tokens of one text that must fit, at the ratio that is expected.
            memory: of the device, before the weights are there.
            share: of the device, which may be filled; what others hold counts.

        Raises:
            ValueError: a share out of range, or no room for that one text.
        """
        if not 0 < share <= 1:
            raise ValueError(f"--memory-fraction {share:g}: must be in (0, 1]")
        fixed = Need(self.weights, self.pool(0, len(lengths)), workspace)
        allowed = max(0, int(share * memory.total) - (memory.total - memory.available))
        num_blocks = (allowed - fixed.total) // self.shape.block_bytes
        smallest = self.blocks(self.method.expected_entries(least))
        if num_blocks < smallest:
            need = Need(fixed.weights, self.pool(smallest, len(lengths)), workspace)
            raise ValueError(
                f"about {need} are needed for one text of {least:,} tokens, {binary_bytes(allowed)} may be used "
                f"(--memory-fraction {share:g}): lower --max-new-tokens, --prefill-chunk or --max-sequences, take "
                "--dtype bfloat16 or a smaller model"
            )
        beside = BLOCKS_BESIDE * self.block_size
        return min(num_blocks, sum(self.blocks(length + beside) for length in lengths))

"""The compressed cache as transformers passes it around: it counts tokens outside, entries per head inside."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from megatron_dmc.hf.configuration_dmc_llama import DMCLlamaConfig
from megatron_dmc.inference.cache.paged_kv_cache import DEFAULT_BLOCK_SIZE, CacheShape, PagedKVCache
from megatron_dmc.inference.cache.usage import CacheUsage
from megatron_dmc.methods import method_of


class DMCCache(Cache):
    """Compressed cache of one batch. Give it as ``past_key_values`` to go on where a text ended.

    What is merged or evicted cannot be brought back, so nothing that takes back tokens works: crop, assisted decoding.
    Each raises ``ValueError``.

    Args:
        config: of the model.
        block_size: entries per block.
    """

    def __init__(self, config: DMCLlamaConfig, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
        super().__init__(layers=[_LayerView(self) for _ in range(config.num_hidden_layers)])
        self.shape, self.settings, self.block_size = config.shape(), config.settings(), block_size
        self.method = method_of(self.settings)
        self.num_columns = 0
        """Columns of ``input_ids`` that were read, padding included."""
        self.paged: PagedKVCache | None = None
        self.rows: list[int] = []

    def prepare(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[PagedKVCache, list[int]]:
        """The memory and the rows of the batch, made on the first call."""
        if self.paged is None:
            shape = CacheShape(
                num_layers=self.shape.num_layers,
                num_kv_heads=self.shape.num_kv_heads,
                head_dim=self.shape.head_dim,
                dtype=dtype,
                state=self.method.state(self.shape.head_dim),
                only_newest_changes=self.method.only_newest_changes,
                block_size=self.block_size,
                max_tokens=self.shape.max_position_embeddings,
            )
            # On a CPU, blocks take memory when they are written; on a GPU the pool begins small.
            grows = device.type != "cpu"
            few = batch * shape.num_heads if grows else None
            self.paged = PagedKVCache(shape, batch, num_blocks=few, may_grow=grows, device=device)
            self.rows = self.paged.add_sequences(batch)
        return self.paged, self.rows

    def num_tokens(self, batch: int) -> list[int]:
        """Tokens of each row that were read, padding left out.

        Raises:
            ValueError: the cache holds a batch of another size.
        """
        if self.paged is None:
            return [0] * batch
        if len(self.rows) != batch:
            raise ValueError(f"the cache holds {len(self.rows)} sequences, {batch} were given: use a new cache")
        return [self.paged.num_tokens[row] for row in self.rows]

    def usage(self) -> CacheUsage:
        """What the cache holds: entries and bytes, beside those of an uncompressed cache."""
        if self.paged is None:
            raise ValueError("the cache is empty: nothing was read yet")
        return CacheUsage.of(self.paged, self.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, which set positions; not the number of entries (see :meth:`usage`)."""
        return self.num_columns

    def reset(self) -> None:
        """Give all memory back."""
        self.paged, self.rows, self.num_columns = None, [], 0

    @property
    def is_initialized(self) -> bool:
        """Whether something was read."""
        return self.paged is not None

    @property
    def batch_size(self) -> int:
        """Sequences of the batch, -1 before the first pass."""
        return len(self.rows) or -1

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse("crop (assisted decoding)")

    def activate_past_recording(self) -> NoReturn:
        _refuse("activate_past_recording (assisted decoding)")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of these rows alone, in this order; one may be named several times."""
        if self.paged is not None:
            self._hold_copies(indices.tolist())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As :meth:`batch_select_indices`: the beams that go on."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Hold every sequence ``repeats`` times, its copies behind one another."""
        if self.paged is not None:
            self._hold_copies([row for row in range(len(self.rows)) for _ in range(repeats)])

    def __deepcopy__(self, memo: dict[int, Any]) -> DMCCache:
        """A cache that goes on by itself, and takes the memory of what is held."""
        copied = copy.copy(self)
        copied.layers = [_LayerView(copied) for _ in self.layers]
        if self.paged is not None:
            copied._hold_copies(range(len(self.rows)))
        return copied

    def _hold_copies(self, rows: Iterable[int]) -> None:
        assert self.paged is not None
        self.paged = self.paged.copies([self.rows[row] for row in rows])
        self.rows = list(range(len(self.paged.num_tokens)))


class _LayerView(CacheLayerMixin):
    """What transformers may ask of one layer; the memory of all layers is in the cache."""

    def __init__(self, cache: DMCCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: see :meth:`DMCCache.prepare`."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError("a DMCCache is written by DMCLlamaForCausalLM only: give another model its own cache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.num_columns

    def get_max_length(self) -> int:
        return -1


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"{what} does not work with a compressed cache: what is merged or evicted cannot be brought back; use greedy "
        "search, sampling or beams, and a new cache for each text"
    )

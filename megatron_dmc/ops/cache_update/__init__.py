"""The compressed cache: append or accumulate, one token per sequence or many.

``reference`` is the recurrence as the paper writes it, one token and one head at a time; ``segments`` the same for
all heads at once; ``chunks`` for many new tokens of each sequence at once, behind what its cache holds already.
``dispatch`` takes one token of each sequence into the cache itself, in place: ``one_step`` in torch operations, or one
Triton kernel (``kernels``).
"""

from megatron_dmc.ops.cache_update.chunks import entry_places, pool_chunks
from megatron_dmc.ops.cache_update.dispatch import update_caches
from megatron_dmc.ops.cache_update.head_caches import FreeBlocks, HeadCaches, Logits, Merging, NewTokens
from megatron_dmc.ops.cache_update.segments import state_shape, update_segments

__all__ = [
    "FreeBlocks",
    "HeadCaches",
    "Logits",
    "Merging",
    "NewTokens",
    "entry_places",
    "pool_chunks",
    "state_shape",
    "update_caches",
    "update_segments",
]

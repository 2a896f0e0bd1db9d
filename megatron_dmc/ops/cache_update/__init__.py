"""The compressed cache: append or accumulate, one token per sequence or many.

``reference`` is the recurrence as the paper writes it, one token and one head at a time; ``segments`` the same for
all heads at once; ``chunks`` for many new tokens of each sequence at once, behind what its cache holds already.
"""

from megatron_dmc.ops.cache_update.chunks import entry_places, pool_chunks
from megatron_dmc.ops.cache_update.segments import state_shape, update_segments

__all__ = ["entry_places", "pool_chunks", "state_shape", "update_segments"]

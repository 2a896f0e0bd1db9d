"""The compressed cache: append or accumulate, one step of every head or a whole prompt.

``reference`` is the recurrence as the paper writes it, one token and one head at a time; ``segments`` the same for
all heads at once.
"""

from megatron_dmc.ops.cache_update.segments import open_segment_state, segment_ends, state_shape, update_segments

__all__ = ["open_segment_state", "segment_ends", "state_shape", "update_segments"]

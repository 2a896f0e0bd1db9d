"""Append to or accumulate in the compressed cache: one step of every head, or a whole prompt.

``reference.py`` is the recurrence as a loop over time; ``segments.py`` the same for all heads at once.
"""

from megatron_dmc.ops.cache_update.segments import open_segment_state, segment_ends, state_shape, update_segments

__all__ = ["open_segment_state", "segment_ends", "state_shape", "update_segments"]

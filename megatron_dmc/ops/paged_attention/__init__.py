"""Decode attention over a paged cache whose block tables differ per KV head.

``reference.py`` is the plain form, ``gather.py`` the PyTorch form for any device.
"""

from megatron_dmc.ops.paged_attention.gather import entry_slots, paged_attention

__all__ = ["entry_slots", "paged_attention"]

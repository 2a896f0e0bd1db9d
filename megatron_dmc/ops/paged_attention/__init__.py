"""Attention over a paged cache whose block tables differ per KV head.

``reference.py`` is the plain form, ``gather.py`` the PyTorch form for any device.
"""

from megatron_dmc.ops.paged_attention.gather import entry_slots, paged_attention, paged_attention_to_chunks

__all__ = ["entry_slots", "paged_attention", "paged_attention_to_chunks"]

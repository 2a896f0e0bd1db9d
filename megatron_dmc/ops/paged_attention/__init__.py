"""Attention over a paged cache whose block tables differ per KV head.

``reference.py`` is the plain form, ``gather.py`` the form in torch operations for any device. On a CPU a step of
decoding reads short caches ``padded`` and others ``in_place``, as ``on_cpu.py`` plans for all layers at once.
"""

from megatron_dmc.ops.paged_attention.gather import entry_slots, paged_attention, paged_attention_to_chunks
from megatron_dmc.ops.paged_attention.on_cpu import DecodePlan, plan_decode

__all__ = [
    "DecodePlan",
    "entry_slots",
    "paged_attention",
    "paged_attention_to_chunks",
    "plan_decode",
]

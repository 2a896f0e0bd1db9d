"""Attention over a paged cache whose block tables differ per KV head.

``reference`` is the plain form, ``gather`` that in torch operations for any device, ``split_attention`` that of GPUs:
Triton ``kernels`` on the chunks of a ``work_list``. ``dispatch`` chooses. On a CPU a step of decoding reads short
caches ``padded`` and others ``in_place``, as ``on_cpu`` plans for all layers at once; caches in 8 bits are gathered.
"""

from megatron_dmc.ops.paged_attention.dispatch import paged_attention
from megatron_dmc.ops.paged_attention.entries import entry_slots, read_keys, write_entries
from megatron_dmc.ops.paged_attention.gather import paged_attention_to_chunks
from megatron_dmc.ops.paged_attention.on_cpu import DecodePlan, plan_decode
from megatron_dmc.ops.paged_attention.work_list import WorkList, lengths_of_rows, work_list

__all__ = [
    "DecodePlan",
    "WorkList",
    "entry_slots",
    "lengths_of_rows",
    "paged_attention",
    "paged_attention_to_chunks",
    "plan_decode",
    "read_keys",
    "work_list",
    "write_entries",
]

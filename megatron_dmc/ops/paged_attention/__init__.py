"""Attention over a paged cache whose block tables differ per KV head.

``reference`` is the plain form, ``gather`` that in torch operations for any device, ``split_attention`` that of GPUs:
Triton ``kernels`` on the chunks of a ``work_list``. ``dispatch`` chooses.
"""

from megatron_dmc.ops.paged_attention.dispatch import paged_attention
from megatron_dmc.ops.paged_attention.entries import entry_slots, read_keys, write_entries
from megatron_dmc.ops.paged_attention.gather import paged_attention_to_chunks
from megatron_dmc.ops.paged_attention.work_list import WorkList, lengths_of_rows, work_list

__all__ = [
    "WorkList",
    "entry_slots",
    "lengths_of_rows",
    "paged_attention",
    "paged_attention_to_chunks",
    "read_keys",
    "work_list",
    "write_entries",
]

"""Entries of the cache in 8 bits: one float32 scale per entry and head, for keys and for values.

The newest entry of a head may still change while its segment is open. It stays in the model's dtype and is quantised
once, when the segment closes; an entry is never quantised twice. ``formats`` lists what an entry may be stored as,
``reference`` is one entry at a time, ``entries`` all at once.
"""

from megatron_dmc.ops.kv_quantization.entries import dequantise, quantise
from megatron_dmc.ops.kv_quantization.formats import AUTO, KV_FORMATS, KVFormat, find_kv_format, format_of

__all__ = ["AUTO", "KV_FORMATS", "KVFormat", "dequantise", "find_kv_format", "format_of", "quantise"]

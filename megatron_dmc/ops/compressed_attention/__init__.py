"""The whole operation of DMC: pooling, RoPE and masked attention over every position's own view of the cache.

``reference`` is its parts in sequence, differentiated by autograd; ``recomputed`` is one step of autograd that keeps
only inputs, output and log-sum-exp. ``faded`` is what the stage before compression computes.
"""

from megatron_dmc.ops.compressed_attention.faded import faded_attention
from megatron_dmc.ops.compressed_attention.recomputed import attend_pooled, compressed_attention, pool_and_rotate
from megatron_dmc.ops.compressed_attention.weights import Weights

__all__ = ["Weights", "attend_pooled", "compressed_attention", "faded_attention", "pool_and_rotate"]

"""Pooling of keys and values inside segments: the running weighted means of DMC.

``reference`` is the loop over time of the paper. ``means`` chooses between ``segment`` (window 0) and ``window``, both
linear in the sequence length with a backward written by hand; they rest on one primitive, the gated scan (``scan`` in
torch operations, ``kernels`` in Triton; ``dispatch`` chooses).
"""

from megatron_dmc.ops.kv_pooling.means import pool_backward, pool_forward, pool_kv

__all__ = ["pool_backward", "pool_forward", "pool_kv"]

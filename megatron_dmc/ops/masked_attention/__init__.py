"""Causal attention whose older keys carry a bias, in memory linear in the sequence length.

DMC hides a key from all queries but its own (``free_window=0``), DMS from those further than a window; without a
bias it is plain causal attention. ``reference`` holds all scores; ``piecewise`` cuts the visible pairs into ``pieces``
for stock kernels (``flash``, with ``blockwise`` where there is none), puts the ``bias`` into a spare channel, and
``merged`` puts the pieces together.
"""

from megatron_dmc.ops.masked_attention.bias import HIDDEN
from megatron_dmc.ops.masked_attention.piecewise import attend_masked, masked_attention

__all__ = ["HIDDEN", "attend_masked", "masked_attention"]

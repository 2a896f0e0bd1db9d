"""The uncompressed cache: every token appends an entry.

Also the model of stage ``zero_out``, whose borrowed channels fade (``neuron_scale``) while nothing is merged yet.

Shapes: T new tokens, S positions, B sequences, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.methods.base import ALONE, Method, Ranks, State, Update, Whole
from megatron_dmc.methods.decisions import NoiseSource
from megatron_dmc.methods.step import Tokens
from megatron_dmc.ops.borrowed import EVERY_HEAD, Borrowed
from megatron_dmc.ops.compressed_attention import faded_attention
from megatron_dmc.ops.geometry import Geometry


class Dense(Method):
    """Plain causal attention.

    Args:
        neuron_scale: factor of the borrowed channels; 1 is Llama, 0 the end of ``zero_out``.
        borrowed: the heads that lend a channel.
    """

    name = "dense"
    compresses = False
    has_whole_form = True
    exact_recompute = True
    only_newest_changes = True

    def __init__(self, neuron_scale: float = 1.0, borrowed: Borrowed = EVERY_HEAD) -> None:
        self.neuron_scale, self.borrowed = neuron_scale, borrowed
        self.updates_in_place = borrowed == EVERY_HEAD

    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """Every token appends."""
        step = tokens.step
        k_TGD = self.rotated_keys(tokens.k_TGD, step)
        if step.decodes:
            return Update(k_TGD, tokens.v_TGD, length_BG, state={})
        entry_TG = length_BG[step.sequence_T] + step.offset_T.unsqueeze(-1)
        return Update(k_TGD, tokens.v_TGD, entry_TG.to(torch.int32), state={})

    def whole(
        self,
        q_TBND: Tensor,
        k_SBGD: Tensor,
        v_SBGD: Tensor,
        geometry: Geometry,
        *,
        adapter_SBG: Tensor | None = None,
        noise: NoiseSource | None = None,
        ranks: Ranks = ALONE,
    ) -> Whole:
        """See :meth:`Method.whole`; nothing is decided."""
        k_SBGD, v_SBGD = ranks.whole_sequence(k_SBGD), ranks.whole_sequence(v_SBGD)
        return Whole(faded_attention(q_TBND, k_SBGD, v_SBGD, self.neuron_scale, geometry, self.borrowed), None)

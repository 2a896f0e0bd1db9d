"""What a layer of a decoder calls between its projections: whole sequences at once, or new tokens through the cache.

Both take any method; neither knows one.

Legend: S positions of whole sequences, T packed new tokens, B sequences, N query heads, G KV heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_dmc.inference.cache.allocator import OutOfBlocks
from megatron_dmc.inference.cache.paged_kv_cache import PagedKVCache
from megatron_dmc.inference.decoder.parallel import ALONE, TensorParallel
from megatron_dmc.methods.base import HeadCaches, Method, Update
from megatron_dmc.methods.decisions import Decisions
from megatron_dmc.methods.step import Step, Tokens
from megatron_dmc.ops.geometry import Geometry


class Attention(Protocol):
    """What a layer calls between its projections."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor | None = None) -> Tensor:
        """[..., N, D] from queries [..., N, D] and keys and values [..., G, D] before RoPE; layers count from 0.

        ``adapter``: float32 [..., G], what the model's adapter makes of the hidden states, if it has one.
        """


@dataclass
class DecisionTrace:
    """The decisions of one pass, by layer: float32 logits and bool alpha, [S, B, G] or [T, G] each."""

    logits: list[Tensor] = field(default_factory=list)
    alpha: list[Tensor] = field(default_factory=list)

    def add(self, decisions: Decisions | None, num_kv_heads: int) -> None:
        """Take in those of the next layer; nothing where a method decides nothing."""
        if decisions is not None:
            every_head = decisions.of_heads(num_kv_heads)
            self.logits.append(every_head.logits)
            self.alpha.append(every_head.hard)


class WholeAttention:
    """Whole sequences at once, [S, B, ...], with hard decisions; nothing is cached. Gradients flow.

    Args:
        method: how the cache would be kept.
        geometry: positions of the sequences.
        trace: filled with the decisions of each layer.
        parallel: the ranks that hold the heads.
    """

    def __init__(
        self,
        method: Method,
        geometry: Geometry,
        trace: DecisionTrace | None = None,
        parallel: TensorParallel = ALONE,
    ) -> None:
        self.method, self.geometry, self.trace, self.parallel = method, geometry, trace, parallel

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor | None = None) -> Tensor:
        ranks = self.parallel.ranks
        output, decisions = self.method.whole(q, k, v, self.geometry, adapter_SBG=adapter, ranks=ranks)
        if self.trace is not None:
            self.trace.add(decisions, k.shape[2])
        return output


class CachedAttention:
    """New tokens, packed [T, ...]: they change the head caches, then each reads its own. No gradients.

    Args:
        method: how the cache is kept.
        cache: with blocks reserved for the pass.
        step: the pass.
        trace: filled with the decisions of each layer.
        parallel: the ranks that hold the heads.
    """

    def __init__(
        self,
        method: Method,
        cache: PagedKVCache,
        step: Step,
        trace: DecisionTrace | None = None,
        parallel: TensorParallel = ALONE,
    ) -> None:
        self.method, self.cache, self.step, self.trace, self.parallel = method, cache, step, trace, parallel

    @torch.no_grad()
    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, adapter: Tensor | None = None) -> Tensor:
        tokens = Tokens(q, k, v, self.step, adapter)
        update = self.method.absorb(tokens, *self.cache.before(layer, self.step))
        caches = self._write(layer, update)
        output = self.method.attend(tokens, update, caches)
        if self.step.decodes:
            self.cache.set_state(layer, self.step, self.method.observe(tokens, update, caches))
        else:
            keep = self.method.survivors(tokens, update, caches)
            self.cache.set_state(layer, self.step, update.state)
            if keep is not None:
                self.cache.compact(layer, self.step, keep)
        if self.trace is not None:
            self.trace.add(update.decisions, k.shape[1])
        return output

    def _write(self, layer: int, update: Update) -> HeadCaches:
        if self.step.decodes:
            return self.cache.write(layer, self.step, update)
        # The pool of one rank may be full where others still have room: none of them may go on alone.
        with self.parallel.together(OutOfBlocks):
            return self.cache.write(layer, self.step, update)

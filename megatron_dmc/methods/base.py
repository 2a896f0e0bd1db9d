"""What a method is: how new tokens change the cache of every head, and what attention then reads.

One observation keeps the interface small: a step of any method writes some entries of a head cache at given places,
and the length grows to the last of them. Dense attention appends; DMC overwrites the newest entry or appends; a
policy that evicts overwrites its victim once its budget is full. So the cache knows no method and the scheduler no
decision. Keys are stored rotated, which leaves the order of entries free.

New tokens are packed: those of one sequence after those of another, without padding.

Legend: T new tokens of all sequences, B sequences, S positions of whole sequences, N query heads, G KV heads, D head
dim, P entries per block, M blocks per head cache, E entries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.methods.decisions import Decisions, NoiseSource
from megatron_dmc.methods.step import ALONE, Ranks, Step, Tokens
from megatron_dmc.ops.borrowed import NO_HEAD, Borrowed
from megatron_dmc.ops.cache_update import Logits, Merging
from megatron_dmc.ops.geometry import Geometry
from megatron_dmc.ops.masked_attention import attend_masked
from megatron_dmc.ops.masked_attention.merged import merge
from megatron_dmc.ops.paged_attention import DecodePlan, paged_attention, paged_attention_to_chunks
from megatron_dmc.ops.paged_kv import PagedKV
from megatron_dmc.ops.rotated import rotated_keys, rotated_queries

State = Mapping[str, Tensor]
"""What a method keeps for every head, by the names of :meth:`Method.state`: [B, G, ...]."""


class Slot(NamedTuple):
    """One tensor that the cache keeps for a method beside every head's keys and values."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class Whole(NamedTuple):
    """Whole sequences at once: attention output [T, B, N, D], and what was decided on the way."""

    output: Tensor
    decisions: Decisions | None


class Update(NamedTuple):
    """What new tokens do to every head cache."""

    k_TGD: Tensor
    """Rotated keys."""
    v_TGD: Tensor
    entry_TG: Tensor
    """int32 place of the entry: the length of its head cache appends, a smaller one overwrites, -1 writes nothing (what
    the last token of a sequence never does)."""
    state: State
    """New values for every head."""
    decisions: Decisions | None = None
    num_queries_BGE: Tensor | None = None
    """int32: how many of the new tokens of its sequence, the first ones, see each entry that was there before; None: as
    :meth:`Method.visible_before` says."""


class HeadCaches(NamedTuple):
    """The head caches of a step's sequences in one layer."""

    kv: PagedKV
    block_table_BGM: Tensor
    before_BG: Tensor
    """int32 entries before the update."""
    length_BG: Tensor
    """int32 entries after it."""
    plan: DecodePlan | None = None
    """How a step of decoding reads them on a CPU."""


class Keep(NamedTuple):
    """The entries of every head cache that survive, in a new order."""

    entry_BGE: Tensor
    """int64 places, those after ``length_BG`` of any value."""
    length_BG: Tensor
    """int32."""
    state: State


class Method(ABC):
    """A way to keep the cache. Stateless: what it remembers of a sequence lives in the cache (:meth:`state`).

    Attributes:
        name: as users know it.
        neuron_scale: factor of the borrowed channels before and after RoPE; 1 where none is borrowed.
        borrowed: the heads that lend a channel.
        compresses: whether the cache can become shorter than the text.
        decision_delay: tokens that come before a hard decision makes a cache shorter; of methods with a whole form.
        has_whole_form: whether :meth:`whole` exists; evaluation and training at once need it.
        exact_recompute: whether reading a text again gives the cache that decoding it gave.
        reads_parts: whether several tokens can be read behind others; where not, a prompt is read whole.
        only_newest_changes: whether no step writes an entry other than the newest and the one after it.
        updates_in_place: whether ``ops.cache_update.update_caches`` does what :meth:`absorb` and the cache do between
            them when every sequence has one new token.
        merging: how tokens merge there; None where every token appends.
    """

    name: str
    neuron_scale: float = 1.0
    borrowed: Borrowed = NO_HEAD
    compresses: bool = True
    decision_delay: int = 0
    has_whole_form: bool = False
    exact_recompute: bool = False
    reads_parts: bool = True
    only_newest_changes: bool = False
    updates_in_place: bool = False
    merging: Merging | None = None

    def state(self, head_dim: int) -> Mapping[str, Slot]:
        """What the cache keeps for every head beside keys and values; any value where a sequence begins."""
        return {}

    @abstractmethod
    def absorb(self, tokens: Tokens, state: State, length_BG: Tensor) -> Update:
        """What ``tokens`` do to head caches of ``length_BG`` entries (int32). Pure; one by one they do the same."""

    def shared_logits(self, q_TND: Tensor, k_TGD: Tensor) -> Logits | None:
        """Logits of new tokens before RoPE, where one decision is several heads'; None where each head has its own."""
        return None

    def attend(self, tokens: Tokens, update: Update, caches: HeadCaches) -> Tensor:
        """Attention output [T, N, D] of the new tokens, each over the cache as it was at its position."""
        if tokens.step.decodes:
            return self._attend_one(self.rotated_queries(tokens), caches)
        out_NTD, lse_NT = self.attend_own(tokens, update)
        if tokens.step.continues:
            cached = paged_attention_to_chunks(
                self.rotated_queries(tokens),
                tokens.step.counts,
                caches.kv,
                caches.block_table_BGM,
                self.visible_before(update, caches, tokens.step),
                update.num_queries_BGE,
            )
            merge(out_NTD, lse_NT, *cached)
        return out_NTD.transpose(0, 1)

    def _attend_one(self, q_BND: Tensor, caches: HeadCaches) -> Tensor:
        if caches.plan is not None:
            return caches.plan.attend(q_BND, caches.kv.k_blocks, caches.kv.v_blocks, caches.length_BG)
        return paged_attention(q_BND, caches.kv, caches.block_table_BGM, caches.length_BG)

    def attend_own(self, tokens: Tokens, update: Update) -> tuple[Tensor, Tensor]:
        """Output [N, T, D] and log-sum-exp [N, T] over the new tokens of the same sequence alone."""
        q, k, v = (x.unsqueeze(1) for x in (self.rotated_queries(tokens), update.k_TGD, update.v_TGD))
        out_T1ND, lse_1NT = attend_masked(q, k, v, None, tokens.step.geometry, free_window=None)
        return out_T1ND.squeeze(1).transpose(0, 1), lse_1NT[0]

    def visible_before(self, update: Update, caches: HeadCaches, step: Step) -> Tensor:
        """int32 [B, G]: how many of the entries before the update the new tokens see."""
        return caches.before_BG

    def observe(self, tokens: Tokens, update: Update, caches: HeadCaches) -> State:
        """The state after a step of decoding, for a method that looks at what attention saw."""
        return update.state

    def expected_entries(self, num_tokens: int) -> float:
        """Entries that a text is expected to leave in every head: what memory is planned by."""
        return num_tokens

    def survivors(self, tokens: Tokens, update: Update, caches: HeadCaches) -> Keep | None:
        """Which entries survive a pass over several tokens, which may end a prompt; None: all."""
        return None

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
        """Attention over whole sequences at once, differentiable, from projections before RoPE.

        Args:
            q_TBND: queries of this rank.
            k_SBGD, v_SBGD: keys and values; ``ranks.whole_sequence`` makes them those of the whole sequence.
            geometry: positions of queries and keys.
            adapter_SBG: what the adapter of a model makes of the hidden states at the positions of the queries, before
                any factor or offset; None for a model without one.
            noise: given, the relaxation that trains; None takes hard decisions.
            ranks: how the layer is spread.

        Raises:
            ValueError: the method has no such form, or shapes do not fit together.
        """
        raise ValueError(f"{self.name} decides token by token and has no whole form: measure it by decoding")

    def rotated_queries(self, tokens: Tokens) -> Tensor:
        """[T, N, D] at the positions of the tokens."""
        q_T1ND, num_kv_heads = tokens.q_TND.unsqueeze(1), tokens.k_TGD.shape[1]
        geometry = tokens.step.geometry
        return rotated_queries(q_T1ND, num_kv_heads, geometry, self.neuron_scale, self.borrowed).squeeze(1)

    def rotated_keys(self, k_TGD: Tensor, step: Step) -> Tensor:
        """[T, G, D] at the positions of the new tokens."""
        return rotated_keys(k_TGD.unsqueeze(1), step.geometry, self.neuron_scale, self.borrowed).squeeze(1)

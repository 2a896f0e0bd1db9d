"""Compressing attention in Megatron: raw projections in, attention output out, one path for every stage.

``DMCSelfAttention`` only withholds Megatron's rotary embedding: keys are pooled before they are rotated.
``DMCCoreAttention`` then does everything between the projections: decisions, pooling, rotation, masked attention
(``methods.dmc``), and reports its decisions to the micro-batch.

Legend: S sequence (whole), L local sequence of a context-parallel rank, B batch, N query heads, G KV heads of this
rank, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_dmc.methods import dmc
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.ops.rope import cos_sin, inverse_frequencies
from megatron_dmc.training.model.config import DMCTransformerConfig
from megatron_dmc.training.model.decision_statistics import AttachStatistic
from megatron_dmc.training.model.microbatch import Microbatch


class DMCSelfAttention(SelfAttention):
    """Megatron's self-attention whose core attention receives queries and keys before RoPE."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["rotary_pos_emb"] = None
        return super().forward(*args, **kwargs)


class DMCCoreAttention(torch.nn.Module):
    """Attention with a compressed cache, all positions at once. No parameters, no buffers: the checkpoint is Llama's.

    Args:
        config: transformer configuration with DMC's settings.
        layer_number: 1-based, over the whole model.
        pg_collection: process groups; tensor and context parallelism are used.
        **unused: arguments of Megatron's own core attention that have no meaning here.
    """

    def __init__(
        self,
        config: DMCTransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.tp_group, self.cp_group = groups.tp, groups.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Microbatch | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [L, B, N, D] before RoPE; key, value: [L, B, G, D].
            attention_mask, attn_mask_type: ignored, attention is causal by position.
            attention_bias: the :class:`Microbatch`; Megatron passes this argument through untouched.
            packed_seq_params: must be None; documents travel in the micro-batch.

        Returns:
            [L, B, N * D]
        """
        microbatch = attention_bias
        assert isinstance(microbatch, Microbatch)
        assert packed_seq_params is None
        if self.config.dmc.compresses:
            output_LBND = self._compressed(query, key, value, microbatch)
        else:
            output_LBND = self._faded(query, key, value, microbatch)
        return output_LBND.reshape(*output_LBND.shape[:2], -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing of this module is stored."""
        return {}

    def _compressed(self, q_LBND: Tensor, k_LBGD: Tensor, v_LBGD: Tensor, microbatch: Microbatch) -> Tensor:
        settings = self.config.dmc
        decision_LBG, importance_LBG = dmc.read_logits(q_LBND, k_LBGD, settings)
        if settings.decisions_per == "layer":
            decision_LBG = _mean_over_ranks(decision_LBG, self.tp_group)
            importance_LBG = _mean_over_ranks(importance_LBG, self.tp_group)
        local = self._local_positions(len(q_LBND), q_LBND.device)
        noise_LBG = self._noise(microbatch, local, decision_LBG.shape[-1])
        fraction_BG = dmc.decision_fraction(decision_LBG, noise_LBG, settings)
        self._report(fraction_BG, k_LBGD, microbatch)
        k_SBGD, v_SBGD, decision_SBG, importance_SBG = (
            self._gather(local_part) for local_part in (k_LBGD, v_LBGD, decision_LBG, importance_LBG)
        )
        sequence_length = len(k_SBGD)
        noise_SBG = noise_LBG
        if self.cp_group.size() > 1:
            everywhere = torch.arange(sequence_length, device=q_LBND.device)
            noise_SBG = self._noise(microbatch, everywhere, decision_LBG.shape[-1])
        output_LBND, _ = dmc.compressed_attention(
            q_LBND,
            k_SBGD,
            v_SBGD,
            decision_SBG,
            importance_SBG,
            settings,
            cos_sin_S=self._rotation(sequence_length, q_LBND.device),
            noise_SBG=noise_SBG,
            query_starts=self._query_starts(len(q_LBND)),
            documents=microbatch.documents,
        )
        if not fraction_BG.requires_grad:
            return output_LBND
        share = settings.loss_weight * self._share(microbatch, batch=q_LBND.shape[1])
        return AttachStatistic.apply(output_LBND, fraction_BG.mean(dim=1), share, microbatch)

    def _faded(self, q_LBND: Tensor, k_LBGD: Tensor, v_LBGD: Tensor, microbatch: Microbatch) -> Tensor:
        k_SBGD, v_SBGD = self._gather(k_LBGD), self._gather(v_LBGD)
        return dmc.faded_attention(
            q_LBND,
            k_SBGD,
            v_SBGD,
            microbatch.neuron_scale,
            cos_sin_S=self._rotation(len(k_SBGD), q_LBND.device),
            query_starts=self._query_starts(len(q_LBND)),
            documents=microbatch.documents,
        )

    def _report(self, fraction_BG: Tensor, k_LBGD: Tensor, microbatch: Microbatch) -> None:
        # A mean of decisions times their number is a count: rounding undoes the division exactly.
        length, _, num_heads, _ = k_LBGD.shape
        count_BG = (fraction_BG.detach().double() * length).round().to(torch.int64)
        heads_per_decision = num_heads // count_BG.shape[1]
        microbatch.accumulated_B[self.layer_number] = count_BG.sum(dim=1) * heads_per_decision

    def _share(self, microbatch: Microbatch, batch: int) -> float:
        """Part of the whole model's decisions that this layer takes on this rank.

        With ``--calculate-per-token-loss`` Megatron divides the gradients of a step by its tokens; then a
        micro-batch counts with its own, masked ones included, since earlier stages never see the mask.
        """
        share = 1.0 / (self.config.num_layers * self.tp_group.size() * self.cp_group.size())
        return share * microbatch.sequence_length * batch if self.config.calculate_per_token_loss else share

    def _noise(self, microbatch: Microbatch, position_S: Tensor, num_heads: int) -> Tensor | None:
        if microbatch.sequence_B is None:
            return None
        per_head = self.config.dmc.decisions_per == "head"
        first_head = self.tp_group.rank() * num_heads if per_head else 0
        return logistic_noise(
            self.config.dmc.noise_seed,
            microbatch.step,
            microbatch.sequence_B.to(position_S.device),
            self.layer_number,
            torch.arange(first_head, first_head + num_heads, device=position_S.device),
            position_S,
        )

    def _rotation(self, sequence_length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        frequencies = inverse_frequencies(self.config.kv_channels, self.config.rope_theta, self.config.rope_stretch)
        return cos_sin(torch.arange(sequence_length, device=device), frequencies.to(device))

    def _query_starts(self, local_length: int) -> tuple[int, int] | None:
        """Start positions of this rank's two chunks: context parallelism deals chunks r and 2 cp - 1 - r to rank r."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        if size == 1:
            return None
        chunk = local_length // 2
        return rank * chunk, (2 * size - 1 - rank) * chunk

    def _local_positions(self, local_length: int, device: torch.device) -> Tensor:
        starts = self._query_starts(local_length)
        if starts is None:
            return torch.arange(local_length, device=device)
        chunk = local_length // 2
        return torch.cat([torch.arange(start, start + chunk, device=device) for start in starts])

    def _gather(self, local: Tensor) -> Tensor:
        """The whole sequence in order from the chunks of all context-parallel ranks; backward sums and scatters."""
        size = self.cp_group.size()
        if size == 1:
            return local
        gathered = gather_from_sequence_parallel_region(local.contiguous(), True, group=self.cp_group)
        chunks = gathered.chunk(2 * size)
        owner_order = [2 * rank for rank in range(size)] + [2 * rank + 1 for rank in reversed(range(size))]
        return torch.cat([chunks[index] for index in owner_order])


class _MeanOverRanks(torch.autograd.Function):
    """Mean over tensor-parallel ranks in both directions: every rank uses the mean for heads of its own."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_reduced(tensor, group) / group.size()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        return _all_reduced(grad_outputs[0], ctx.group) / ctx.group.size(), None


def _mean_over_ranks(tensor: Tensor, group: Any) -> Tensor:
    return tensor if group.size() == 1 else _MeanOverRanks.apply(tensor, group)


def _all_reduced(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total

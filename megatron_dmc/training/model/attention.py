"""Compressing attention in Megatron: raw projections in, attention output out, one path for every method and stage.

``DMCSelfAttention`` withholds Megatron's rotary embedding, since keys are pooled before they are rotated, and holds the
adapter where there is one. ``MethodCoreAttention`` then does everything between the projections by the method's form
for whole sequences (``megatron_dmc.methods``), and reports its decisions to the micro-batch.

Legend: S sequence (whole), L local sequence of a context-parallel rank, B batch, N query heads, G KV heads of this
rank, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_dmc.config import has_adapter
from megatron_dmc.methods import Dense, method_of
from megatron_dmc.methods.base import Ranks
from megatron_dmc.methods.decisions import Decisions
from megatron_dmc.ops.noise import logistic_noise
from megatron_dmc.training.model.adapter import MODULES, WithAdapter
from megatron_dmc.training.model.config import DMCTransformerConfig
from megatron_dmc.training.model.decision_statistics import AttachStatistic
from megatron_dmc.training.model.microbatch import Microbatch
from megatron_dmc.training.model.norm import DMCRMSNorm


class DMCSelfAttention(SelfAttention):
    """Megatron's self-attention whose core attention receives queries and keys before RoPE.

    With an adapter the keys have one more channel, its outputs.
    """

    def __init__(self, config: DMCTransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if has_adapter(config.dmc):
            self.decision_norm = DMCRMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.decision = ColumnParallelLinear(
                config.hidden_size,
                config.num_query_groups,
                config=config,
                init_method=torch.nn.init.zeros_,
                bias=False,
                gather_output=False,
                tp_group=self.tp_group,
            )

    def adapter_logits(self, hidden_SBH: Tensor) -> Tensor:
        """Outputs of the adapter [S, B, G] for the hidden state as it enters the layer."""
        return self.decision(self.decision_norm(hidden_SBH))[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["rotary_pos_emb"] = None
        given = kwargs.get("attention_bias")
        if isinstance(given, WithAdapter):
            # Megatron hands this argument to get_query_key_value_tensors and to nothing else.
            kwargs |= {"attention_bias": given.microbatch, "key_value_states": given.adapter_SBG}
        return super().forward(*args, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Megatron's, before RoPE; ``key_value_states`` [S, B, G] becomes the last channel of the keys."""
        query, key, value = super().get_query_key_value_tensors(hidden_states, **kwargs)
        if key_value_states is not None:
            key = torch.cat([key, key_value_states.unsqueeze(-1)], dim=-1)
        return query, key, value

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's; of an adapter the weights alone, it has no state of low-precision training."""
        state = super().sharded_state_dict(*args, **kwargs)
        unused = tuple(f"{module}._extra_state" for module in MODULES)
        return {name: value for name, value in state.items() if not name.endswith(unused)}


class MethodCoreAttention(torch.nn.Module):
    """Attention of a method, all positions at once. It has no parameters and no buffers.

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
            query: [L, B, N, D] before RoPE; key, value: [L, B, G, D]; key [L, B, G, D + 1] with an adapter's output.
            attention_mask, attn_mask_type: ignored, attention is causal by position.
            attention_bias: the :class:`Microbatch`; Megatron passes this argument through untouched.
            packed_seq_params: must be None; documents travel in the micro-batch.

        Returns:
            [L, B, N * D]
        """
        microbatch = attention_bias
        assert isinstance(microbatch, Microbatch)
        assert packed_seq_params is None
        settings = self.config.dmc
        method = Dense() if microbatch.is_teachers else method_of(settings, microbatch.neuron_scale)
        head_dim = query.shape[-1]
        output_LBND, decisions = method.whole(
            query,
            key[..., :head_dim],
            value,
            microbatch.geometry,
            adapter_SBG=key[..., -1] if key.shape[-1] > head_dim else None,
            noise=None if microbatch.sequence_B is None else lambda heads: self._noise(microbatch, heads),
            ranks=Ranks(self._mean_over_heads, self._whole_sequence),
        )
        if decisions is not None:
            output_LBND = self._report(output_LBND, decisions, microbatch)
        return output_LBND.reshape(*output_LBND.shape[:2], -1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Nothing of this module is stored."""
        return {}

    def _report(self, output_LBND: Tensor, decisions: Decisions, microbatch: Microbatch) -> Tensor:
        """Count what this rank decided, and let the compression loss in through the output's gradient."""
        geometry = microbatch.geometry
        fraction_BG = decisions.fraction(None if self.cp_group.size() == 1 else geometry.query_T)
        # A mean of decisions times their number is a count: rounding undoes the division exactly.
        count_BG = (fraction_BG.detach().double() * geometry.query_count).round().to(torch.int64)
        heads_per_decision = self._num_kv_heads // count_BG.shape[1]
        microbatch.statistics.decided_B[self.layer_number] = count_BG.sum(dim=1) * heads_per_decision
        if microbatch.observer is not None:
            microbatch.observer(microbatch, self.layer_number, self._first_head(count_BG.shape[1]), decisions)
        if not fraction_BG.requires_grad:
            return output_LBND
        share = self.config.dmc.loss_weight * self._share(microbatch)
        return AttachStatistic.apply(output_LBND, fraction_BG.mean(dim=1), share, microbatch)

    def _share(self, microbatch: Microbatch) -> float:
        """Part of the whole model's decisions that this layer takes on this rank.

        With ``--calculate-per-token-loss`` Megatron divides the gradients of a step by its tokens; then a
        micro-batch counts with its own, masked ones included, since earlier stages never see the mask.
        """
        share = 1.0 / (self.config.num_layers * self.tp_group.size() * self.cp_group.size())
        geometry = microbatch.geometry
        return share * geometry.length * geometry.batch if self.config.calculate_per_token_loss else share

    @property
    def _num_kv_heads(self) -> int:
        """KV heads of this rank."""
        return self.config.num_query_groups // self.tp_group.size()

    def _first_head(self, num_heads: int) -> int:
        """Ordinal of this rank's first deciding head in the layer; 0 where the layer decides at once."""
        return self.tp_group.rank() * num_heads if num_heads == self._num_kv_heads else 0

    def _noise(self, microbatch: Microbatch, num_heads: int) -> Tensor:
        """Logistic noise [S, B, heads] of all positions, the same on every rank that computes them."""
        assert microbatch.sequence_B is not None
        device = microbatch.geometry.device
        first_head = self._first_head(num_heads) if self.config.dmc.decisions_per == "head" else 0
        return logistic_noise(
            self.config.dmc.noise_seed,
            microbatch.step,
            microbatch.sequence_B.to(device),
            self.layer_number,
            torch.arange(first_head, first_head + num_heads, device=device),
            torch.arange(microbatch.geometry.length, device=device),
        )

    def _mean_over_heads(self, tensor: Tensor) -> Tensor:
        return tensor if self.tp_group.size() == 1 else _MeanOverRanks.apply(tensor, self.tp_group)

    def _whole_sequence(self, local: Tensor) -> Tensor:
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


def _all_reduced(tensor: Tensor, group: Any) -> Tensor:
    total = tensor.clone()
    torch.distributed.all_reduce(total, group=group)
    return total

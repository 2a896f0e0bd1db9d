"""Megatron's GPT model that hands a micro-batch to its layers and closes the compression loss.

Legend: S sequence, B batch, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.training.model.borrowed_rows import clear_borrowed_rows
from megatron_dmc.training.model.decision_statistics import AppendRow, StripRow
from megatron_dmc.training.model.microbatch import Microbatch


class DMCGPTModel(GPTModel):
    """``GPTModel`` with one more argument of ``forward``, the :class:`Microbatch`."""

    _counted_step = -1
    _microbatches_run = 0

    def count_microbatch(self, step: int) -> int:
        """Micro-batches that this chunk has run in ``step`` before this one."""
        if step != self._counted_step:
            self._counted_step, self._microbatches_run = step, 0
        self._microbatches_run += 1
        return self._microbatches_run - 1

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load; at the start of ``retrofit`` the rows that produce the borrowed channels become zero.

        Here, between loading and the optimizer's copy of the weights, the step is part of every way to load.
        """
        result = super().load_state_dict(*args, **kwargs)
        if self.config.dmc_clear_borrowed_rows:
            clear_borrowed_rows(self)
        return result

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Keep what the previous stage sent; ``forward``, which has the micro-batch, takes the row off."""
        self._received_SBH = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, *args: Any, microbatch: Microbatch, **kwargs: Any) -> Tensor:
        """Megatron's ``GPTModel.forward``.

        Args:
            microbatch: coordinates and settings of this pass; its statistics are filled in.

        Returns:
            LM loss [B, S] or logits on the last stage, hidden states (with one row more) on the others.
        """
        compresses = self.config.dmc.compresses
        if not self.pre_process:
            received = self._received_SBH
            self.decoder.set_input_tensor(StripRow.apply(received, microbatch) if compresses else received)
        output = super().forward(*args, extra_block_kwargs={"attention_bias": microbatch}, **kwargs)
        if not compresses:
            return output
        if self.post_process:
            self._close_statistics(microbatch)
            return output
        return AppendRow.apply(output, microbatch)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Megatron's cross-entropy, over the real vocabulary only.

        Its padding depends on tensor parallelism, and padded rows would enter the softmax with logits near 0.
        """
        vocab_size, width = self.config.dmc_vocab_size, logits.shape[-1]
        if vocab_size is not None:
            real = min(max(vocab_size - self.tp_group.rank() * width, 0), width)
            if real < width:
                logits[..., real:] = torch.finfo(logits.dtype).min
        return super().compute_language_model_loss(labels, logits)

    @torch.no_grad()
    def _close_statistics(self, microbatch: Microbatch) -> None:
        """Sum the counts over the ranks that share these sequences; every rank computes the same gate from them."""
        statistics = microbatch.statistics
        count_B = statistics.total_B()
        for group in (self.pg_collection.tp, self.pg_collection.cp):
            if group.size() > 1:
                torch.distributed.all_reduce(count_B, group=group)
        decisions = self.config.num_layers * self.config.num_query_groups * microbatch.geometry.length
        statistics.fraction_B = count_B.double() / decisions
        statistics.gate_B = (statistics.fraction_B < microbatch.target_fraction).float()

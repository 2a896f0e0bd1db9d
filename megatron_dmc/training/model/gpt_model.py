"""Megatron's GPT model that hands a micro-batch to its layers, learns from a teacher, and closes the compression loss.

Legend: S sequence, B batch, H hidden, V vocabulary of this rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_dmc.config import NONE, REVERSE
from megatron_dmc.training.model.adapter import is_of_adapter
from megatron_dmc.training.model.borrowed_rows import clear_borrowed_rows
from megatron_dmc.training.model.decision_statistics import AppendRow, StripRow
from megatron_dmc.training.model.divergence import losses
from megatron_dmc.training.model.microbatch import Microbatch
from megatron_dmc.training.model.teacher import logits_of, run_teacher, with_teacher, without_teacher


class DMCGPTModel(GPTModel):
    """``GPTModel`` with one more argument of ``forward``, the :class:`Microbatch`.

    Attributes:
        frozen_teacher: a copy of the model before its retrofit, in a tuple: a module of this one would be trained,
            wrapped and saved with it. Empty where the model teaches itself, or nobody does.
    """

    frozen_teacher: tuple[GPTModel, ...] = ()
    _loaded = False
    _counted_step = -1
    _microbatches_run = 0

    def count_microbatch(self, step: int) -> int:
        """Micro-batches that this chunk has run in ``step`` before this one."""
        if step != self._counted_step:
            self._counted_step, self._microbatches_run = step, 0
        self._microbatches_run += 1
        return self._microbatches_run - 1

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's; before the first load without the adapters that the checkpoint does not have."""
        state = super().sharded_state_dict(*args, **kwargs)
        if self._lacks_adapters:
            return {name: value for name, value in state.items() if not is_of_adapter(name)}
        return state

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load; what a checkpoint of the stage before does not have yet begins here.

        At the start of ``retrofit`` the rows that produce the borrowed channels become zero, or the adapters, which
        are zero, stay as they were built. Between loading and the optimizer's copy of the weights, the step is part of
        every way to load.
        """
        if self._lacks_adapters:
            state_dict = state_dict | {name: x for name, x in self.state_dict().items() if is_of_adapter(name)}
        result = super().load_state_dict(state_dict, *args, **kwargs)
        self._loaded = True
        if self.config.dmc_clear_borrowed_rows:
            clear_borrowed_rows(self)
        return result

    @property
    def _lacks_adapters(self) -> bool:
        """Whether the checkpoint that is loaded next has no adapters."""
        return self.config.dmc_creates_adapters and not self._loaded

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Keep what the previous stage sent; ``forward``, which has the micro-batch, takes it apart."""
        self._received_SBH = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, *args: Any, microbatch: Microbatch, **kwargs: Any) -> Tensor:
        """Megatron's ``GPTModel.forward``.

        Args:
            microbatch: coordinates and settings of this pass; its statistics are filled in.

        Returns:
            on the last stage logits, or with labels the loss of every token [B, S], which is the divergence where
            there is a teacher; on the others hidden states, with one row more and the teacher's.
        """
        compresses, distills = self.config.dmc.compresses, self.config.dmc.distill != NONE
        own = taught = None
        if not self.pre_process:
            own, taught = without_teacher(self._received_SBH) if distills else (self._received_SBH, None)
            own = StripRow.apply(own, microbatch) if compresses else own
        if distills:
            teacher = self.frozen_teacher[0] if self.frozen_teacher else self
            taught = run_teacher(teacher, taught, microbatch, *args, **kwargs)
            if self.post_process:
                kwargs["output_processor"] = functools.partial(self._distill, taught, microbatch)
        self.decoder.set_input_tensor(own)
        output = super().forward(*args, extra_block_kwargs={"attention_bias": microbatch}, **kwargs)
        if self.post_process:
            if compresses:
                self._close_statistics(microbatch)
            return output
        sent = AppendRow.apply(output, microbatch) if compresses else output
        return sent if taught is None else with_teacher(sent, taught)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Megatron's cross-entropy, over the real vocabulary only."""
        return super().compute_language_model_loss(labels, self._without_padding(logits))

    def _distill(self, taught_SBV: Tensor, microbatch: Microbatch, *, labels: Tensor, **given: Any) -> Tensor:
        """The divergence from the teacher [B, S]; the LM loss goes to the statistics."""
        both_SBV = [self._without_padding(logits) for logits in (logits_of(**given), taught_SBV)]
        student_RV, teacher_RV = (logits.flatten(0, 1) for logits in both_SBV)
        reverse = self.config.dmc.distill == REVERSE
        found = losses(student_RV, teacher_RV, labels.t().flatten(), reverse=reverse, group=self.tp_group)
        divergence_BS, cross_entropy_BS = (loss_R.view(labels.shape[::-1]).t().contiguous() for loss_R in found)
        microbatch.statistics.cross_entropy_BS = cross_entropy_BS
        return divergence_BS

    @torch.no_grad()
    def _without_padding(self, logits: Tensor) -> Tensor:
        """``logits``, in which the columns that pad the vocabulary become the least number, in place.

        The padding depends on tensor parallelism, and would enter the softmax with logits near 0. Outside of the graph:
        the gradient of every loss of ours is zero there.
        """
        vocab_size, width = self.config.dmc_vocab_size, logits.shape[-1]
        if vocab_size is not None:
            real = min(max(vocab_size - self.tp_group.rank() * width, 0), width)
            if real < width:
                logits[..., real:] = torch.finfo(logits.dtype).min
        return logits

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

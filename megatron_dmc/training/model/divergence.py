"""How far a student's next tokens are from its teacher's, where tensor-parallel ranks share the vocabulary.

With p of the teacher and q of the student, forward is KL(p || q) and reverse KL(q || p), in nats, at temperature 1.
Logits are never gathered: a row needs the maxima and four sums over the whole vocabulary, and its gradient nothing
more. Everything is float32, a few rows at a time; what is kept for the backward pass are the logits themselves.

Legend: R rows (tokens), V vocabulary of this rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.slices import row_slices


class Losses(NamedTuple):
    """Of every row, float32 [R]."""

    divergence: Tensor
    cross_entropy: Tensor
    """Of the student on the labels. Without a gradient: it is reported, not trained."""


def losses(student_RV: Tensor, teacher_RV: Tensor, label_R: Tensor, *, reverse: bool, group: Any = None) -> Losses:
    """The divergence, differentiable in the student's logits, and the cross-entropy beside it.

    Args:
        student_RV: logits of this rank's part of the vocabulary; columns that only pad it are at their type's minimum
            in both.
        teacher_RV: likewise.
        label_R: int64 tokens, in the whole vocabulary.
        reverse: the direction.
        group: process group of tensor parallelism; None: this rank has the whole vocabulary.
    """
    return Losses(*_Divergence.apply(student_RV, teacher_RV, label_R, reverse, group))


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_RV: Tensor, teacher_RV: Tensor, label_R: Tensor, reverse: bool, group: Any
    ) -> tuple[Tensor, Tensor]:
        top_2R = torch.stack([student_RV.amax(dim=-1), teacher_RV.amax(dim=-1)]).float()
        _all_reduce(top_2R, group, torch.distributed.ReduceOp.MAX)
        label_logit_R = _at(label_R, student_RV, top_2R, group)
        sums_4R = torch.stack([*_sums(student_RV, teacher_RV, top_2R, reverse), label_logit_R])
        _all_reduce(sums_4R, group, torch.distributed.ReduceOp.SUM)
        student_R, teacher_R, weighted_R, label_logit_R = sums_4R
        log_student_R, log_teacher_R = student_R.log(), teacher_R.log()
        if reverse:
            divergence_R = weighted_R / student_R - log_student_R + log_teacher_R
        else:
            divergence_R = weighted_R / teacher_R - log_teacher_R + log_student_R
        cross_entropy_R = log_student_R - label_logit_R
        normalizer_2R = top_2R + torch.stack([log_student_R, log_teacher_R])
        ctx.save_for_backward(student_RV, teacher_RV, normalizer_2R, divergence_R)
        ctx.reverse = reverse
        ctx.mark_non_differentiable(cross_entropy_R)
        return divergence_R, cross_entropy_R

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        student_RV, teacher_RV, normalizer_2R, divergence_R = ctx.saved_tensors
        grad_RV = torch.empty_like(student_RV)
        for rows in row_slices(student_RV):
            log_q, log_p = _shifted(student_RV, teacher_RV, normalizer_2R, rows)
            if ctx.reverse:
                grad = log_q.exp().mul_(log_q - log_p - divergence_R[rows, None])
            else:
                grad = log_q.exp_().sub_(log_p.exp_())
            grad_RV[rows] = grad.mul_(grad_outputs[0][rows, None])
        return grad_RV, None, None, None, None


def _sums(student_RV: Tensor, teacher_RV: Tensor, top_2R: Tensor, reverse: bool) -> Tensor:
    """Over this rank's vocabulary [3, R]: exponentials of both, and their weighted difference, above the maxima."""
    sums_3R = top_2R.new_empty(3, len(student_RV))
    for rows in row_slices(student_RV):
        student, teacher = _shifted(student_RV, teacher_RV, top_2R, rows)
        difference = student - teacher if reverse else teacher - student
        student.exp_()
        teacher.exp_()
        sums_3R[0, rows] = student.sum(dim=-1)
        sums_3R[1, rows] = teacher.sum(dim=-1)
        sums_3R[2, rows] = difference.mul_(student if reverse else teacher).sum(dim=-1)
    return sums_3R


def _shifted(student_RV: Tensor, teacher_RV: Tensor, by_2R: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Some rows of both in float32, less a number of each row; new tensors."""
    return student_RV[rows].float() - by_2R[0, rows, None], teacher_RV[rows].float() - by_2R[1, rows, None]


def _at(label_R: Tensor, student_RV: Tensor, top_2R: Tensor, group: Any) -> Tensor:
    """The student's logits of the labels above its maxima; 0 where another rank has them."""
    width = student_RV.shape[-1]
    local_R = label_R - (0 if group is None else group.rank() * width)
    inside_R = (local_R >= 0) & (local_R < width)
    logit_R = student_RV.gather(-1, local_R.clamp(0, width - 1).unsqueeze(-1)).squeeze(-1).float()
    return torch.where(inside_R, logit_R - top_2R[0], 0.0)


def _all_reduce(tensor: Tensor, group: Any, operation: Any) -> None:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(tensor, operation, group=group)

"""The teacher's rows between pipeline stages: they arrive, and no gradient flows into them."""

import pytest
import torch

from megatron_dmc.training.model.teacher import with_teacher, without_teacher

S, B, H = 5, 2, 3


@pytest.mark.parametrize("statistics", [0, 1], ids=["plain", "with_statistics"])
def test_both_arrive_and_the_student_alone_learns(statistics):
    student = torch.randn(S + statistics, B, H, requires_grad=True)
    teacher = torch.randn(S, B, H, requires_grad=True)
    sent = with_teacher(student, teacher)
    received = sent.detach().requires_grad_()
    found_student, found_teacher = without_teacher(received)
    assert torch.equal(found_student, student)
    assert torch.equal(found_teacher, teacher)
    assert not found_teacher.requires_grad
    grad = torch.randn_like(found_student)
    found_student.backward(grad)
    assert not received.grad[-S:].any()
    # What comes back for the teacher's rows is ignored, whatever it is.
    sent.backward(received.grad + torch.cat([torch.zeros_like(student), torch.ones_like(teacher)]))
    assert torch.equal(student.grad, grad)
    assert teacher.grad is None

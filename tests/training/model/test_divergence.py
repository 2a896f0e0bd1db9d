"""The divergence of shared vocabularies equals plain autograd of torch's on whole ones, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dmc.ops import slices
from megatron_dmc.training.model.divergence import losses
from tests.layouts.ranks import run_ranks

ROWS, VOCABULARY, PADDED = 11, 37, 48
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
"""Relative; bfloat16 has 8 bits, and the gradient is rounded to it once."""


def given(dtype=torch.float32, seed=0):
    """Logits of both with padded columns, labels, and a gradient of the divergence."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, ROWS, PADDED, generator=generator)).to(dtype)
    for logits in (student, teacher):
        logits[:, VOCABULARY:] = torch.finfo(dtype).min
    label = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return student, teacher, label, torch.randn(ROWS, generator=generator)


def reference(student, teacher, label, grad, *, reverse):
    """torch's divergence and cross-entropy in float64, and the gradient of the former."""
    student = student[:, :VOCABULARY].double().requires_grad_()
    log_q, log_p = student.log_softmax(-1), teacher[:, :VOCABULARY].double().log_softmax(-1)
    given, target = (log_p, log_q) if reverse else (log_q, log_p)
    divergence = F.kl_div(given, target, log_target=True, reduction="none").sum(-1)
    divergence.backward(grad.double())
    return divergence.detach(), F.cross_entropy(student.detach(), label, reduction="none"), student.grad


def assert_close(found, expected, dtype):
    error = (found.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("elements", [1, 5 * PADDED, 1 << 20])
def test_it_is_torchs(dtype, reverse, elements, monkeypatch):
    monkeypatch.setitem(slices.SLICE_ELEMENTS, "cpu", elements)
    student, teacher, label, grad = given(dtype)
    divergence, cross_entropy, expected = reference(student, teacher, label, grad, reverse=reverse)
    found = losses(student.requires_grad_(), teacher, label, reverse=reverse)
    found.divergence.backward(grad)
    assert_close(found.divergence.detach(), divergence, torch.float32)
    assert_close(found.cross_entropy, cross_entropy, torch.float32)
    assert_close(student.grad[:, :VOCABULARY], expected, dtype)
    assert not student.grad[:, VOCABULARY:].any()
    assert not found.cross_entropy.requires_grad
    assert found.divergence.dtype == torch.float32


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_equal_logits_are_at_no_distance(reverse):
    """Exactly, and logits that a constant shifts within rounding: where a retrofit starts nothing pulls."""
    student, _, label, grad = given()
    found = losses(student.requires_grad_(), student.detach().clone(), label, reverse=reverse)
    found.divergence.backward(grad)
    assert not found.divergence.any()
    assert not student.grad.any()
    shifted = losses(student, student.detach() + 100.0, label, reverse=reverse)
    assert shifted.divergence.abs().max() < 1e-4


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_it_survives_logits_far_apart(reverse):
    student, teacher, label, grad = given()
    for logits in (student, teacher):
        logits[:, :VOCABULARY] *= 1e4
    divergence, cross_entropy, _ = reference(student, teacher, label, grad, reverse=reverse)
    found = losses(student.requires_grad_(), teacher, label, reverse=reverse)
    found.divergence.backward(grad)
    assert_close(found.divergence.detach(), divergence, torch.float32)
    assert_close(found.cross_entropy, cross_entropy, torch.float32)
    assert student.grad.isfinite().all()


def on_a_rank(reverse):
    """Values and this rank's part of the gradient; the last rank has padding alone."""
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    student, teacher, label, grad = given()
    student, teacher = (x.chunk(size, dim=-1)[rank].contiguous() for x in (student, teacher))
    found = losses(student.requires_grad_(), teacher, label, reverse=reverse, group=torch.distributed.group.WORLD)
    found.divergence.backward(grad)
    return [x.detach().numpy() for x in (*found, student.grad)]


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("ranks", [2, 6])
def test_ranks_share_the_vocabulary(ranks, reverse, tmp_path):
    pytest.importorskip("megatron.core")
    divergence, cross_entropy, expected = reference(*given(), reverse=reverse)
    answers = run_ranks(on_a_rank, ranks, tmp_path / "logs", reverse)
    for answer in answers:
        assert_close(torch.from_numpy(answer[0]), divergence, torch.float32)
        assert_close(torch.from_numpy(answer[1]), cross_entropy, torch.float32)
    whole = torch.cat([torch.from_numpy(answer[2]) for answer in answers], dim=-1)
    assert_close(whole[:, :VOCABULARY], expected, torch.float32)
    assert not whole[:, VOCABULARY:].any()

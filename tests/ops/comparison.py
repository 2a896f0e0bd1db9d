"""Run two forms of an operation on the same inputs and compare outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.tolerances import GRADIENT, GRADIENT_FLOOR, OUTPUT, gradient_error, output_error

Operation = Callable[..., Tensor | tuple[Tensor, ...]]


def assert_same(fast: Operation, reference: Operation, inputs: Sequence[Tensor]) -> None:
    """Compare ``fast`` on ``inputs`` with ``reference`` on them in float64: outputs, and gradients of all inputs."""
    dtype = inputs[0].dtype
    found, found_gradients = _run(fast, inputs)
    expected, expected_gradients = _run(reference, [x.double() for x in inputs])
    for index, (x, y) in enumerate(zip(found, expected, strict=True)):
        error = output_error(x, y)
        assert error <= OUTPUT[dtype], f"output {index}: error {error:.2e}, allowed {OUTPUT[dtype]:.0e}"
    for index, (x, y) in enumerate(zip(found_gradients, expected_gradients, strict=True)):
        assert x.dtype == inputs[index].dtype
        error = gradient_error(x, y, GRADIENT_FLOOR)
        assert error <= GRADIENT[dtype], f"gradient of input {index}: error {error:.2e}, allowed {GRADIENT[dtype]:.0e}"


def _run(operation: Operation, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = operation(*leaves)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    torch.autograd.backward(outputs, grads)
    return outputs, [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]

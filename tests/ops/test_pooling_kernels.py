"""The Triton kernels of pooling: run on a CPU by Triton's interpreter, and compiled for a GPU that is not needed."""

from __future__ import annotations

import pytest
import torch

from tests.ops.interpreter import compile_launches, run_in_interpreter


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    run_in_interpreter("tests/ops/pooling_kernels_in_interpreter.py")


def test_launches_compile_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to machine code; whether it is fast, only a GPU can tell."""
    pytest.importorskip("triton")
    from megatron_dmc.ops.kv_pooling import kernels

    compiled = compile_launches(monkeypatch)
    decay, gain = torch.rand(2, 40, 2, 2)
    x, grad = torch.randn(2, 40, 2, 2, 64)
    y = kernels.gated_scan(decay, gain, x, reverse=True)
    kernels.gated_scan_backward(decay, gain, x, y, grad, reverse=True)
    assert [kernel.metadata.name for kernel in compiled] == ["_scan_kernel", "_scan_backward_kernel"]
    assert all(kernel.asm["cubin"] for kernel in compiled)

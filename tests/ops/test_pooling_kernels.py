"""The Triton kernels of pooling: run on a CPU by Triton's interpreter, and compiled for a GPU that is not needed."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import compile_for_hopper, run_in_interpreter


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    run_in_interpreter("pooling_kernels_in_interpreter.py")


@pytest.mark.parametrize("kernel", ["_scan_kernel", "_scan_backward_kernel"])
def test_kernels_compile_for_hopper(kernel: str) -> None:
    """Down to machine code; whether it is fast, only a GPU can tell."""
    pytest.importorskip("triton")
    from megatron_dmc.ops.kv_pooling import kernels

    function = getattr(kernels, kernel)
    constants = {"REVERSE": True, "HAS_GAIN": True, "BLOCK_S": kernels.BLOCK_S, "BLOCK_D": kernels.MAX_BLOCK_D}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    assert compile_for_hopper(function, constants, {}).asm["cubin"]

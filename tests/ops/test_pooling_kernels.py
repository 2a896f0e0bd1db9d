"""The Triton kernels of pooling: run on a CPU by Triton's interpreter, and compiled for a GPU that is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    """In a process of their own: the interpreter must be chosen before Triton is imported."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name("kernels_in_interpreter.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tests.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("kernel", ["_scan_kernel", "_scan_backward_kernel"])
def test_kernels_compile_for_hopper(kernel: str) -> None:
    """Down to machine code; whether it is fast, only a GPU can tell."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_dmc.ops.kv_pooling import kernels

    function = getattr(kernels, kernel)
    constants = {"REVERSE": True, "HAS_GAIN": True, "BLOCK_S": kernels.BLOCK_S, "BLOCK_D": kernels.MAX_BLOCK_D}
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else "*fp32" if name.endswith("_ptr") else "i32"
        for name in function.arg_names
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]

"""Triton kernels without a GPU: run by Triton's interpreter, and compiled down to machine code for a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_in_interpreter(name: str, *arguments: str) -> None:
    """Run the tests of a file beside this one in a process of its own: Triton chooses when it is imported."""
    pytest.importorskip("triton")
    tests = Path(__file__).with_name(name)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, str(tests)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=tests.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


def compile_for_hopper(kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: int) -> Any:
    """Machine code of a kernel for compute capability 9.0.

    Args:
        kernel: of Triton.
        constants: arguments by name that are known when it is compiled; None leaves a tensor out.
        types: of the others, by name: ``*bf16``, ``i32``; by default float32 tensors and 32-bit integers.
        options: ``num_warps`` and the like.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def multiply_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter's matrix products take bfloat16: Triton 3.9 multiplies the bits as integers."""
    import numpy
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(x: TensorHandle) -> TensorHandle:
        if x.dtype.scalar != language.bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), language.float32)

    def create_dot_of_numbers(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot_of_numbers)

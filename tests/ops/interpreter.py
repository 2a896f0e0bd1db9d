"""Triton kernels without a GPU: run by Triton's interpreter, and compiled down to machine code for a Hopper GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from megatron_dmc.ops import triton_kernels

ROOT = Path(__file__).parents[2]


def run_in_interpreter(tests: str) -> None:
    """Run the tests of a file in a process of their own: Triton chooses when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


class HopperDriver:
    """What the launch of a kernel asks the driver of a Hopper GPU."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


def compile_launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """From now on a launch binds its arguments and compiles its kernel for Hopper as on a GPU, but runs nothing.

    Returns:
        The compiled kernels, as they come.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    run, compiled = JITFunction.run, []

    def only_compile(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    monkeypatch.setattr(JITFunction, "run", only_compile)
    monkeypatch.setattr(driver, "_active", HopperDriver())
    return compiled


def repair_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two faults of the interpreter of Triton 3.9, which compiled kernels do not have.

    Matrix products take the bits of bfloat16 for integers. Rounding float32 to fewer bits loses the carry into the
    exponent: 7.9 becomes 4.0 in float8_e4m3fn.
    """
    from triton.runtime import interpreter

    create_dot, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def create_dot_of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), *rest)

    def convert_rounding(x: Any, from_type: Any, to_type: Any, rounding: Any) -> Any:
        dtype = {"bf16": torch.bfloat16, "fp8e4nv": torch.float8_e4m3fn}.get(str(to_type))
        if str(from_type) != "fp32" or dtype is None:
            return convert(x, from_type, to_type, rounding)
        bits = torch.uint16 if dtype.itemsize == 2 else torch.uint8
        return torch.from_numpy(numpy.ascontiguousarray(x)).to(dtype).view(bits).numpy()

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot_of_numbers)
    monkeypatch.setattr(interpreter, "_convert_float", convert_rounding)


def _widened(x: Any) -> Any:
    """A value of the interpreter, as float32 if it is bfloat16."""
    from triton import language
    from triton.runtime.interpreter import TensorHandle

    if x.dtype.scalar != language.bfloat16:
        return x
    return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), language.float32)


def choose_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let operations run their kernels although the tensors are on a CPU."""
    repair_interpreter(monkeypatch)
    monkeypatch.setattr(triton_kernels, "reason_without", lambda device_type, dtype: None)
    triton_kernels.load.cache_clear()

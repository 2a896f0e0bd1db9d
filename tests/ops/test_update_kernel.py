"""The Triton kernel of a decoding step: run on a CPU by Triton's interpreter, and compiled for a Hopper GPU."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import compile_for_hopper, run_in_interpreter


@pytest.mark.slow
def test_kernel_in_interpreter() -> None:
    run_in_interpreter("update_kernel_in_interpreter.py")


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "i8", "fp8e4nv"])
@pytest.mark.parametrize("window_size", [0, 12])
def test_kernel_compiles_for_hopper(window_size: int, kv: str) -> None:
    pytest.importorskip("triton")
    from megatron_dmc.ops.cache_update import kernels

    constants = {"R": 4, "HALF": 64, "P": 32, "W": window_size, "LARGEST": 127.0, "DECIDE_PER_HEAD": False}
    constants |= {"BLOCK_R": 4, "BLOCK_C": 64, "BLOCK_W": 16 if window_size else 1}
    constants |= {"decision_ptr": None, "importance_ptr": None}
    types = {f"{name}_ptr": "*bf16" for name in ("q", "k", "v", "k_open", "v_open", "q_out")}
    types |= {f"{name}_ptr": "*i32" for name in ("open_entry", "table", "length", "free", "num_free")}
    types |= {"position_ptr": "*i64", "row_ptr": "*i64", "accumulate_ptr": "*i1"}
    types |= {"k_blocks_ptr": f"*{kv}", "v_blocks_ptr": f"*{kv}"}
    types |= dict.fromkeys(("decision_bias", "decision_threshold", "importance_epsilon", "neuron_scale"), "fp32")
    if kv == "bf16":
        constants |= {f"{name}_ptr": None for name in ("k_scale", "v_scale", "k_open", "v_open", "open_entry")}
    compiled = compile_for_hopper(kernels.update_kernel, constants, types, num_warps=4 if window_size else 1)
    assert compiled.asm["cubin"]

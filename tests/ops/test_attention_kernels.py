"""The Triton kernels of split attention: run on a CPU by Triton's interpreter, and compiled for a Hopper GPU."""

from __future__ import annotations

import pytest

from tests.ops.interpreter import compile_for_hopper, run_in_interpreter


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    run_in_interpreter("attention_kernels_in_interpreter.py")


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "i8", "fp8e4nv"])
@pytest.mark.parametrize("group", [1, 8])
def test_chunk_kernel_compiles_for_hopper(group: int, kv: str) -> None:
    """Down to machine code; whether it is fast, only a GPU can tell."""
    pytest.importorskip("triton")
    from megatron_dmc.ops.paged_attention import kernels, split_attention

    head_dim = 128
    sizes = split_attention.tuning(group, head_dim, 2 if kv == "bf16" else 1)
    constants = {"R": group, "D": head_dim, "P": 32, "CHUNK": 256, "BLOCK_R": 1 if group == 1 else 16}
    constants |= {"BLOCK_D": head_dim, "BLOCK_E": sizes.block_e, "NUM_STAGES": sizes.num_stages}
    constants |= {"row_ptr": None, "scores_ptr": None}
    types = {f"{name}_ptr": "*i32" for name in ("open_entry", "table", "length", "order", "start")}
    types |= {"q_ptr": "*bf16", "k_ptr": f"*{kv}", "v_ptr": f"*{kv}", "k_open_ptr": "*bf16", "v_open_ptr": "*bf16"}
    types["score_scale"] = "fp32"
    if kv == "bf16":
        constants |= {f"{name}_ptr": None for name in ("k_scale", "v_scale", "k_open", "v_open", "open_entry")}
    compiled = compile_for_hopper(
        kernels.chunk_kernel, constants, types, num_warps=sizes.num_warps, enable_fp_fusion=True
    )
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared * sizes.programs <= 228 * 1024, "persistent programs do not fit together"


@pytest.mark.slow
def test_reduce_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    from megatron_dmc.ops.paged_attention import kernels

    constants = {"R": 4, "D": 80, "CHUNK": 256, "BLOCK_D": 128, "BLOCK_C": 16}
    types = {f"{name}_ptr": "*i32" for name in ("length", "order", "start")} | {"row_ptr": "*i64"}
    assert compile_for_hopper(kernels.reduce_kernel, constants, types).asm["cubin"]

"""The Triton kernels of split attention: run on a CPU by Triton's interpreter, and compiled for a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_dmc.ops.paged_attention import work_list
from tests.ops.interpreter import compile_launches, run_in_interpreter
from tests.ops.random_caches import random_cache

SHARED_MEMORY = 227 * 1024
"""Bytes of a multiprocessor of a Hopper GPU."""


@pytest.mark.slow
def test_kernels_in_interpreter() -> None:
    run_in_interpreter("tests/ops/attention_kernels_in_interpreter.py")


@pytest.mark.slow
@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("group", [1, 8])
def test_launches_compile_for_hopper(monkeypatch: pytest.MonkeyPatch, group: int, kv_dtype: str) -> None:
    """Down to machine code; whether it is fast, only a GPU can tell."""
    pytest.importorskip("triton")
    from megatron_dmc.ops.paged_attention import split_attention

    compiled = compile_launches(monkeypatch)
    kv, table, lengths = random_cache([[5, 0], [65, 33]], 128, 32, dtype=torch.bfloat16, kv_dtype=kv_dtype)
    q_BND = torch.randn(2, 2 * group, 128).bfloat16()
    rows_B = torch.tensor([1, -1])
    split_attention.attend(q_BND, kv, table, lengths)
    split_attention.attend(q_BND, kv, table, lengths, rows_B=rows_B, work=work_list(lengths, 128), keep_weights=True)
    assert [kernel.metadata.name for kernel in compiled] == ["chunk_kernel", "reduce_kernel"] * 2
    assert all(kernel.asm["cubin"] for kernel in compiled)
    programs = split_attention.tuning(group, 128, kv.k_blocks.itemsize).programs
    assert compiled[0].metadata.shared * programs <= SHARED_MEMORY, "persistent programs do not fit together"


@pytest.mark.slow
def test_other_batches_and_layers_need_no_other_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each number of sequences would be compiled while somebody waits."""
    pytest.importorskip("triton")
    from megatron_dmc.ops.paged_attention import split_attention

    compiled = compile_launches(monkeypatch)
    for lengths in ([[3]], [[3] * 16] * 2, [[100, 3, 1]]):
        kv, table, length_BG = random_cache(lengths, 64, 16)
        length_LBG = torch.stack((length_BG, length_BG))
        work = work_list(length_LBG)
        for layer in range(2):
            q_BND = torch.randn(*length_BG.shape, 64)
            split_attention.attend(q_BND, kv, table, length_LBG[layer], work=work.of_layer(layer))
    assert len({id(kernel) for kernel in compiled}) == 2

"""The Triton kernel of a decoding step: run on a CPU by Triton's interpreter, and compiled for a Hopper GPU."""

from __future__ import annotations

import pytest
import torch

from tests.ops.decode_steps import empty_caches, free_list, own_logits, random_tokens
from tests.ops.interpreter import compile_launches, run_in_interpreter
from tests.ops.test_update_caches import CASES


@pytest.mark.slow
def test_kernel_in_interpreter() -> None:
    run_in_interpreter("tests/ops/update_kernel_in_interpreter.py")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_launches_compile_for_hopper(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pytest.importorskip("triton")
    from megatron_dmc.ops.cache_update import kernels

    compiled = compile_launches(monkeypatch)
    case = CASES[name]
    caches, tokens = empty_caches(case), random_tokens(case, 0)
    kernels.update_caches(
        tokens,
        caches,
        torch.tensor(case.rows),
        merging=case.merging,
        logits=own_logits(tokens, case) if case.per_layer else None,
        free=free_list(caches) if case.has_free_list else None,
    )
    assert compiled[0].asm["cubin"]

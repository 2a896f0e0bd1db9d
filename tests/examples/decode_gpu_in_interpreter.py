"""Tests of the benchmark of decoding on a GPU, run in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from examples.benchmarks import decode_gpu_check
from examples.benchmarks.decode_gpu_attention import PEERS, measure
from examples.benchmarks.gpu_caches import Shape
from megatron_dmc.ops.paged_attention import split_attention
from tests.ops.interpreter import repair_interpreter

SHAPE = Shape(2, 2, 2, 16, 24, sigma=1.0, block_size=8, num_layers=2)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it should be."""
    repair_interpreter(monkeypatch)


def test_checks_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(decode_gpu_check.checks("cpu"))
    assert max(decode_gpu_check.run(check, "cpu").values()) < 1
    attend = split_attention.attend

    def wrong(*args: object, **options: object) -> object:
        output, *rest = attend(*args, **options)
        output[0, -1, -1] += 1e-3
        return output, *rest

    monkeypatch.setattr(split_attention, "attend", wrong)
    errors = decode_gpu_check.run(check, "cpu")
    assert errors.pop("attention") > 10
    assert max(errors.values()) < 1


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
def test_a_measurement_agrees_with_torch_before_it_counts(kv_dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(device="cpu", repeats=1)
    peers = PEERS if kv_dtype == "auto" else {}
    rows = list(measure(dataclasses.replace(SHAPE, kv_dtype=kv_dtype), 1e9, options, peers))
    assert rows[0].name == "attention: difference from float32"
    assert rows[0].met
    assert rows[2].value == pytest.approx(
        rows[1].value * 2e-6 / (rows[2].conditions["entries"] * entry_bytes(kv_dtype) / 1e9)
    )
    names = [row.name for row in rows[3:]]
    assert names == (["attention: ours / scaled_dot_product_attention: time"] if peers else [])
    # What cannot be imported is said and left out.
    assert ("flashinfer xqa: ModuleNotFoundError" in capsys.readouterr().out) == bool(peers)


def entry_bytes(kv_dtype: str) -> float:
    """Key and value of 16 channels, and two scales in 8 bits."""
    return 2 * 16 * 2 if kv_dtype == "auto" else 2 * (16 + 4)

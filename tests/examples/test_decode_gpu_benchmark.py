"""The benchmark of decoding on a GPU, as far as it runs without one: checks, refusals, shapes, tiny steps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.benchmarks import decode_gpu, decode_gpu_step
from examples.benchmarks.gpu_caches import DTYPE, Deadline, Shape, make_caches
from examples.benchmarks.measure import Row
from tests.inference.tiny_model import tiny_llama
from tests.ops.interpreter import run_in_interpreter

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_checks_alone_run_on_a_cpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    output = tmp_path / "out.json"
    command = [sys.executable, "-m", "examples.benchmarks.decode_gpu", "--check-only", "--device", "cpu"]
    done = subprocess.run([*command, "--json", str(output)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(output.read_text())["rows"]
    assert {"check: attention, float32, entries as int8: error over allowed"} <= {row["name"] for row in rows}
    assert all(row["met"] for row in rows)


@pytest.mark.slow
def test_checks_and_measurements_in_interpreter() -> None:
    run_in_interpreter("tests/examples/decode_gpu_in_interpreter.py")


def test_nothing_is_measured_where_a_kernel_is_wrong(monkeypatch, tmp_path, capsys) -> None:
    rows = [Row("check: keys", 0.5, "ratio", {}, 1.0), Row("check: attention", 3.0, "ratio", {}, 1.0)]
    monkeypatch.setattr(decode_gpu, "check_rows", lambda device: iter(rows))
    monkeypatch.setattr("sys.argv", ["decode_gpu", "--json", str(tmp_path / "out.json")])
    assert decode_gpu.main() == 2
    assert len(json.loads((tmp_path / "out.json").read_text())["rows"]) == 2
    assert "check: attention: 3, allowed 1: nothing was measured" in capsys.readouterr().err


def test_suites_share_the_time_and_partial_results_survive(monkeypatch, tmp_path) -> None:
    seen = []

    def suite(options, bandwidth, deadline):
        seen.append(deadline)
        yield Row("one", 1.0, "ms", {})
        assert len(json.loads(options.json.read_text())["rows"]) == 1 + 2 * len(seen) - 1
        yield Row("two", 2.0, "ms", {})

    monkeypatch.setattr(decode_gpu, "SUITES", {"a": suite, "b": suite})
    monkeypatch.setattr(decode_gpu, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(
        "sys.argv", ["decode_gpu", "--no-check", "--suites", "a,b", "--json", str(tmp_path / "out.json")]
    )
    assert decode_gpu.main() == 0
    assert len(seen) == 2
    assert not seen[1].passed


def test_a_deadline_passes() -> None:
    assert Deadline(0).passed
    assert not Deadline(1).share(4).passed


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--suites", "speed"], "speed: known are attention,step"), (["--device", "cpu"], "nothing to measure")],
)
def test_what_cannot_be_done_is_said(monkeypatch, capsys, flags, message) -> None:
    monkeypatch.setattr("sys.argv", ["decode_gpu", *flags])
    with pytest.raises(SystemExit):
        decode_gpu.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "int8"])
def test_caches_are_of_the_asked_shape(kv_dtype: str) -> None:
    shape = Shape(20, 4, 1, 16, 400, compression_ratio=4.0, sigma=0.5, kv_dtype=kv_dtype, block_size=16, num_layers=3)
    caches = make_caches(shape, "cpu", spare_entries=16)
    lengths = caches.length_LBG.float()
    assert lengths.shape == (3, 20, 4)
    assert lengths.mean().item() == pytest.approx(100, rel=0.1)
    assert lengths.log().std().item() == pytest.approx(0.5, rel=0.15)
    assert int(caches.length_LBG.max()) <= 400
    held = -(-(caches.length_LBG + 16) // 16)
    blocks = caches.table_LBGM[torch.arange(caches.table_LBGM.shape[-1]) < held.unsqueeze(-1)]
    assert sorted(blocks.tolist()) == list(range(len(caches.kv.k_blocks)))
    assert caches.kv.k_blocks.float().isfinite().all()
    pool = [x.nbytes for x in caches.kv[:4] if x is not None]
    assert sum(pool) == len(caches.kv.k_blocks) * 16 * shape.entry_bytes


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_steps_of_a_tiny_model(ratio: float, capsys) -> None:
    config = tiny_llama(dtype="bfloat16")
    model = decode_gpu_step.random_model(config, "cpu")
    shape = decode_gpu_step._shape(config, ratio, 1.0, 3)
    rows = [row for row, _ in decode_gpu_step.measure(model, shape, 1e9)]
    assert [row.name for row in rows] == ["step: time", "step: tokens per second", "step: time over its roofline"]
    assert rows[1].value == pytest.approx(3 / (rows[0].value / 1000))
    weights = 2 * (50 * 32 + 32 + 2 * (2 * 32 + 32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48))
    roofline = (weights + rows[0].conditions["entries"] * 2 * 16 * DTYPE.itemsize) / 1e9
    assert rows[2].value == pytest.approx(rows[0].value / 1000 / roofline)
    assert rows[0].conditions["method"] == ("dense" if ratio == 1 else "dmc")
    assert "captured steps of 3 sequences" in capsys.readouterr().out

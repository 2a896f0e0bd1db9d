"""The benchmark of training: what its rows say, and that both sides run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmarks import training, training_attention
from examples.benchmarks.measure import Row, growth_exponent, median_ratio, report, timed


def test_a_goal_is_the_largest_value_allowed() -> None:
    assert Row("time", 1.35, "ratio", {}, goal=1.35).met is True
    assert Row("time", 1.36, "ratio", {}, goal=1.35).met is False
    assert Row("time", 9.0, "ratio", {}).met is None


def test_growth_exponent_of_a_power() -> None:
    lengths = [512, 1024, 4096]
    assert growth_exponent(lengths, [3e-6 * n**2 for n in lengths]) == pytest.approx(2.0)


def test_ratio_is_taken_turn_by_turn() -> None:
    """A turn in which both sides were slowed down says the same as the others."""
    seconds = {"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 1.0]}
    assert median_ratio(seconds, "a", "b") == 2.0


@pytest.mark.parametrize("heads", training_attention.HEADS.values())
def test_both_sides_run(heads: tuple[int, int]) -> None:
    shape = training_attention.Shape(40, *heads, head_dim=16)
    seconds = timed({name: side(shape) for name, side in training_attention.SIDES.items()}, repeats=2)
    assert all(len(times) == 2 and min(times) > 0 for times in seconds.values())


def test_report_writes_machine_and_rows(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    report([Row("time", 1.2, "ratio", {"length": 4096}, goal=1.35)], output)
    written = json.loads(output.read_text())
    assert written["machine"]["versions"]["torch"]
    assert written["rows"] == [
        {"name": "time", "value": 1.2, "unit": "ratio", "goal": 1.35, "met": True, "conditions": {"length": 4096}}
    ]


def test_unknown_suite_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["training", "--suites", "attention,speed"])
    with pytest.raises(SystemExit):
        training.main()
    assert "speed: known are attention,pooling,step" in capsys.readouterr().err


@pytest.mark.slow
def test_a_step_of_both_sides_is_measured() -> None:
    small = ["--layers", "1", "--hidden-size", "128", "--sequence-length", "64"]
    command = [sys.executable, "-m", "examples.benchmarks.training_step", *small]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    measured = json.loads(finished.stdout.splitlines()[-1])
    assert measured["seconds"].keys() == {"zero_out", "retrofit"}
    assert measured["ratio"] > 0


@pytest.mark.exhaustive
def test_memory_of_a_side_is_that_of_its_tensors() -> None:
    """q, k, v, output, their gradients and two rotated copies: at least 11, at most 30 tensors of one size."""
    shape = training_attention.Shape(2048, 4, 4, 64)
    for side in training_attention.SIDES:
        tensors = training_attention._peak_bytes(side, shape) / (2048 * 4 * 64 * 4)
        assert 11 <= tensors <= 30, (side, tensors)

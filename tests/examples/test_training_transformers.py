"""The benchmark of a training step beside transformers: both sides run, and one that fails says why."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.benchmarks import training_transformers
from tests.checkpoints_convert.models import write_model


def test_a_side_that_fails_shows_its_words() -> None:
    with (
        training_transformers._started("transformers", {"modell": "absent"}) as step,
        pytest.raises(RuntimeError, match=r"transformers ended before its steps:(.|\n)*'modell'"),
    ):
        step()


@pytest.mark.slow
def test_both_sides_take_their_steps(tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    small = ["--sequence-length", "16", "--stages", "retrofit", "--dtypes", "bfloat16", "--repeats", "1"]
    module = "examples.benchmarks.training_transformers"
    command = [sys.executable, "-m", module, "--model", str(write_model(tmp_path / "model")), "--json", str(output)]
    subprocess.run([*command, *small], capture_output=True, text=True, timeout=300, check=True)
    rows = json.loads(output.read_text())["rows"]
    assert [row["unit"] for row in rows] == ["s", "s", "ratio"]
    ours, theirs, ratio = (row["value"] for row in rows)
    assert ratio == pytest.approx(ours / theirs)
    assert {row["goal"] for row in rows} == {None, training_transformers.GOAL}

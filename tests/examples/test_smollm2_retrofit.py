"""The worked example: its script calls the program as the program is, in order, and continues where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dmc.cli import build_parser
from megatron_dmc.training.arguments import add_dmc_arguments

SCRIPT = Path(__file__).parents[2] / "examples" / "smollm2" / "retrofit.sh"
RECORD = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
"""
"""Stands in for the interpreter: writes down what it is asked to run."""


@pytest.fixture
def calls(tmp_path):
    """Runs the script with a stand-in for Python, and returns the arguments of every call."""

    def run(*arguments: str) -> tuple[int, list[list[str]]]:
        stand_in, record = tmp_path / "python", tmp_path / "calls"
        stand_in.write_text(RECORD)
        stand_in.chmod(0o755)
        record.write_text("")
        environment = {**os.environ, "PYTHON": str(stand_in), "CALLS": str(record)}
        done = subprocess.run(["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, check=False)
        return done.returncode, [json.loads(line) for line in record.read_text().splitlines()]

    return run


def test_every_call_is_one_that_the_program_takes(calls, tmp_path):
    status, made = calls("model", str(tmp_path / "run"), "--bf16")
    assert status == 0
    for call in made:
        assert call[:2] == ["-m", "megatron_dmc"]
        args = build_parser().parse_args(call[2:])
        if call[2] == "train":
            parser = argparse.ArgumentParser(allow_abbrev=False)
            _, others = add_dmc_arguments(parser).parse_known_args(args.megatron_flags)
            assert "--bf16" in others
            assert not [flag for flag in others if flag.startswith("--dmc")]


def test_one_stage_follows_the_base_and_is_measured_beside_policies(calls, tmp_path):
    run = tmp_path / "run"
    _, made = calls("model", str(run))
    (train,) = [call for call in made if "train" in call]
    assert train[train.index("--dmc-stage") + 1] == "retrofit"
    assert train[train.index("--pretrained-checkpoint") + 1] == str(run / "base")
    policies = [call[call.index("--policy") + 1] if "--policy" in call else None for call in made if "evaluate" in call]
    assert policies == [None, "h2o", "tova"]
    assert sorted(path.name for path in (run / "evaluation").iterdir()) == ["dms.json", "h2o.json", "tova.json"]


def test_data_and_base_that_exist_are_not_made_again(calls, tmp_path):
    (tmp_path / "run" / "data").mkdir(parents=True)
    (tmp_path / "run" / "base").mkdir()
    _, made = calls("model", str(tmp_path / "run"))
    assert [call[2] for call in made[:2]] == ["train", "evaluate"]


def test_usage_without_a_model(calls):
    assert calls() == (1, [])

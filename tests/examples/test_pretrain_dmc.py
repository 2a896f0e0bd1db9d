"""The example script trains as ``megatron-dmc train`` does: it writes its metrics and obeys the flags that stop it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "--dmc-stage zero_out --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --mock-data --eval-iters 0"


@pytest.mark.slow
def test_it_obeys_the_stop_file_and_writes_metrics(tmp_path):
    save, stop = tmp_path / "zero_out", tmp_path / "stop"
    shutil.copytree(ROOT / "tests" / "training" / "zero_out_of_0_1_0", save)
    stop.touch()
    command = [sys.executable, str(ROOT / "examples" / "pretrain_dmc.py"), *FLAGS.split()]
    command += [
        "--make-vocab-size-divisible-by",
        "4",
        "--dmc-total-samples",
        "100",
        "--train-iters",
        "9",
        "--save-interval",
        "9",
    ]
    command += ["--save", str(save), "--dmc-stop-file", str(stop), "--override-opt-param-scheduler"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["stage"]) for line in lines] == [(2, "zero_out")]
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "2"

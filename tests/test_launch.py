"""The launch scripts: clean shell, the right commands in the right order, and no stage after an interrupted one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHELL_FILES = ("launch/*.sh", "launch/*.sbatch", "examples/*/*.sh", ".ci/run")
SCRIPTS = sorted(path for pattern in SHELL_FILES for path in ROOT.glob(pattern))
OUR_MODULES = f'case "$*" in *"-m megatron_dmc.r"*) shift $((SHIFTED)); exec {sys.executable} "$@" ;; esac\n'
RECORD = "#!/usr/bin/env bash\n" + OUR_MODULES + 'printf "%s\\n" "$*" >> "$CALLS"\n'
"""Stands in for a program: the product's own modules run, other calls are recorded."""


def run_script(script, tmp_path, *, tools, **variables):
    """Run a launch script with stand-ins for the programs it calls; exit status, error output, recorded calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SHIFTED": "3" if "srun" in tools else "0",
        "PYTHONPATH": str(ROOT),
        "PYTHON": str(folder / "python"),
        "DATA": "data",
        "RUN": str(tmp_path / "run"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "41234",
        **variables,
    }
    command = ["bash", str(ROOT / "launch" / script), "--bf16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    calls = tmp_path / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (tests/apt-packages.txt)")
    command = ["shellcheck", "--external-sources", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_stages_follow_one_another(tmp_path):
    done, calls = run_script("train.sh", tmp_path, tools={"python": RECORD}, BASE="base", GPUS_PER_NODE="8")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    starts = [("zero_out", "base", 250), ("retrofit", run / "zero_out", 18000), ("consolidate", run / "retrofit", 2000)]
    for call, (stage, previous, steps) in zip(calls, starts, strict=True):
        assert call.startswith("-m torch.distributed.run --standalone --nproc-per-node 8 -m megatron_dmc train ")
        assert f"--dmc-stage {stage} " in call
        assert f"--pretrained-checkpoint {previous} --save {run / stage} " in call
        assert f"--train-iters {steps} " in call
        assert "--dmc-total-samples 20736000 " in call
        assert call.endswith(" --bf16")


def test_missing_settings_are_named(tmp_path):
    done, calls = run_script("train.sh", tmp_path, tools={"python": RECORD})
    assert done.returncode != 0
    assert "BASE: checkpoint made by megatron-dmc convert import" in done.stderr
    assert calls == []


def ends_with(status, code, reached):
    """Shell lines of a training that records ``status`` and leaves with ``code``."""
    save = 'save=$(sed "s/.*--save \\([^ ]*\\).*/\\1/" <<< "$*"); mkdir -p "$save"\n'
    record = {"iteration": reached, "train_iters": 250, "status": status, "stop_at_cr": None}
    return f"{save}echo '{json.dumps(record)}' > \"$save/outcome.json\"\nexit {code}\n"


def slurm_tools(ending):
    """``srun`` whose trainings end so, and ``scontrol``."""
    address = 'printf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" >> "$CALLS"\n'
    return {"srun": RECORD + address + ending, "scontrol": "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"}


def test_slurm_runs_every_stage(tmp_path):
    done, calls = run_script("train.sbatch", tmp_path, tools=slurm_tools(ends_with("complete", 0, 250)), BASE="base")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 6
    assert {calls[1], calls[3], calls[5]} == {"node1:21234"}
    assert all("-m megatron_dmc train --dmc-stage" in call for call in calls[::2])
    assert all(call.endswith(" --exit-signal-handler --bf16") for call in calls[::2])


# Neither launcher hands on the status 75 of a task: torchrun leaves with 1, srun with that of the tasks it killed.
@pytest.mark.parametrize(("script", "status"), [("train.sh", 1), ("train.sbatch", 143)])
def test_no_stage_starts_after_an_interrupted_one(tmp_path, script, status):
    ending = ends_with("interrupted", status, 100)
    tools = {"python": RECORD + ending} if script == "train.sh" else slurm_tools(ending)
    done, calls = run_script(script, tmp_path, tools=tools, BASE="base")
    assert done.returncode == 75
    assert "interrupted at iteration 100 of 250" in done.stderr
    assert done.stderr.splitlines()[-1] == "zero_out was interrupted: the same command continues"
    assert not any("--dmc-stage retrofit" in call for call in calls)


def test_the_status_of_a_crash_is_kept(tmp_path):
    done, calls = run_script("train.sh", tmp_path, tools={"python": RECORD + "exit 13\n"}, BASE="base")
    assert (done.returncode, len(calls)) == (13, 1)
    assert "no training has ended here" in done.stderr


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"RETROFIT_STEPS": "many"}, "RETROFIT_STEPS='many': must be a whole number"),
        ({"ZERO_OUT_STEPS": "0"}, "zero_out of 0 steps: must be at least 1"),
        ({"MICRO_BATCH_SIZE": "3"}, "micro_batch_size=3: must divide the global batch of 1024"),
    ],
)
def test_settings_that_cannot_be(tmp_path, variable, message):
    done, calls = run_script("train.sh", tmp_path, tools={"python": RECORD}, BASE="base", **variable)
    assert (done.returncode, calls) == (1, [])
    assert message in done.stderr

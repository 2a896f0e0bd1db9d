"""The launch scripts: clean shell, the right commands in the right order, and no stage after an interrupted one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci" / "run"])
RECORD = '#!/usr/bin/env bash\nprintf "%s\\n" "$*" >> "$CALLS"\n'


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


def slurm_tools(reached):
    """``srun`` that leaves a tracker at iteration ``reached``, and ``scontrol``."""
    save = 'save=$(sed "s/.*--save \\([^ ]*\\).*/\\1/" <<< "$*"); mkdir -p "$save"\n'
    tracker = f'echo {reached} > "$save/latest_checkpointed_iteration.txt"\n'
    address = 'printf "%s\\n" "$MASTER_ADDR:$MASTER_PORT" >> "$CALLS"\n'
    return {"srun": RECORD + address + save + tracker, "scontrol": "#!/bin/sh\nprintf 'node1\\nnode2\\n'\n"}


def test_slurm_runs_every_stage(tmp_path):
    done, calls = run_script("train.sbatch", tmp_path, tools=slurm_tools(18000), BASE="base")
    assert done.returncode == 0, done.stderr
    assert len(calls) == 6
    assert {calls[1], calls[3], calls[5]} == {"node1:21234"}
    assert all("-m megatron_dmc train --dmc-stage" in call for call in calls[::2])


def test_slurm_stops_after_an_interrupted_stage(tmp_path):
    done, calls = run_script("train.sbatch", tmp_path, tools=slurm_tools(100), BASE="base")
    assert done.returncode == 0
    assert "zero_out was interrupted: submit this job again" in done.stdout
    assert len(calls) == 2

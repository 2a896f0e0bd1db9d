"""Stages run side by side, continue, and fail with what their process said."""

import signal
import sys
import threading
import time

import pytest

from megatron_dmc.recipes import run_stages as module
from megatron_dmc.recipes.run_stages import LOG_FILE, StageRun, run_stages
from megatron_dmc.support.errors import InfrastructureError

# Stands in for the interpreter: called with -m megatron_dmc train FLAGS --save DIRECTORY.
TRAINER = """#!/bin/bash
directory="${@: -1}"
case "$*" in
  *refuse*) echo "megatron-dmc: the flag is wrong" ; exit 1 ;;
  *unfinished*) exit 75 ;;
  *die*) echo "out of memory" ; kill -9 $$ ;;
  *hang*) echo $$ > "$directory/pid" ; exec sleep 60 ;;
esac
echo '{"step": 1}' >> "$directory/metrics.jsonl"
echo "threads $OMP_NUM_THREADS"
"""


@pytest.fixture(autouse=True)
def trainer(tmp_path, monkeypatch):
    path = tmp_path / "python"
    path.write_text(TRAINER)
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: {0, 1})


def stage(tmp_path, name, *flags):
    return StageRun(flags, tmp_path / name, steps=1)


def test_two_stages_share_the_cores(tmp_path, capsys):
    pair = [stage(tmp_path, "retrofit"), stage(tmp_path, "control_retrofit")]
    run_stages(pair)
    assert [one.steps_done for one in pair] == [1, 1]
    assert [(one.directory / LOG_FILE).read_text() for one in pair] == ["threads 1\n", "threads 1\n"]
    assert "training retrofit and its control: 1 steps in " in capsys.readouterr().err


def test_a_stage_alone_has_all_cores(tmp_path):
    run_stages([stage(tmp_path, "base")])
    assert (tmp_path / "base" / LOG_FILE).read_text() == "threads 2\n"


def test_a_users_mistake_stays_one(tmp_path):
    with pytest.raises(ValueError, match="^the flag is wrong$"):
        run_stages([stage(tmp_path, "base", "refuse")])


def test_an_interrupted_stage_is_not_taken_for_a_finished_one(tmp_path):
    with pytest.raises(InfrastructureError, match="base was interrupted: the same command continues"):
        run_stages([stage(tmp_path, "base", "unfinished")])


def test_a_killed_process_is_told_with_the_end_of_its_log(tmp_path):
    with pytest.raises(InfrastructureError, match=r"exit code -9; the end of .*(.|\n)*out of memory"):
        run_stages([stage(tmp_path, "base", "die")])


def test_a_failure_ends_the_neighbour(tmp_path):
    start = time.monotonic()
    with pytest.raises(InfrastructureError):
        run_stages([stage(tmp_path, "hanging", "hang"), stage(tmp_path, "dying", "die")])
    assert time.monotonic() - start < 30  # the neighbour would hang for 60


def test_an_interruption_ends_the_processes(tmp_path):
    threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        run_stages([stage(tmp_path, "hanging", "hang")])
    process = int((tmp_path / "hanging" / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        module.os.kill(process, 0)

"""A stage says on every rank how it ended, and the next one starts only from a finished one."""

import json

import pytest

from megatron_dmc.cli import main
from megatron_dmc.runs.completeness import Outcome, Status, read_outcome
from tests.layouts.cases import PIPELINE, RETROFIT
from tests.layouts.ranks import run_ranks

LONGER = ("--override-opt-param-scheduler",)
"""Without it Megatron refuses to continue with another length."""
FLAGS = {"dmc_target_cr": 1.2, "exit_interval": None}


def command(argv):
    """``megatron-dmc train`` on one rank; its exit code."""
    return main(["train", *argv])


@pytest.fixture
def train(laboratory, tmp_path, request):
    """Train a retrofit in a directory of the test; exit codes of all ranks and what rank 0 said last."""

    def run(ranks=1, switches=(), variant=RETROFIT, base=None, **flags):
        flags = {"train_iters": 4, "save": tmp_path / "save", "pretrained_checkpoint": base} | FLAGS | flags
        flags["pretrained_checkpoint"] = base or laboratory.base(variant)
        logs = tmp_path / f"logs{len(list(tmp_path.iterdir()))}"
        codes = run_ranks(command, ranks, logs, laboratory.arguments(variant, switches, **flags))
        return codes, (logs / "rank0.log").read_text().splitlines()[-1]

    return run


def consolidate(train, tmp_path, **flags):
    """Start the next stage from the retrofit."""
    flags = {"dmc_stage": "consolidate", "save": tmp_path / "next", "train_iters": 1} | flags
    return train(base=tmp_path / "save", **flags)


def test_layout_interrupted_stage(train, tmp_path):
    """The exit interval stands for a signal, a time limit and a stop file: Megatron leaves them all with status 0."""
    codes, said = train(ranks=2, switches=PIPELINE, exit_interval=2)
    assert codes == [75, 75]
    assert said == "stage interrupted at iteration 2 of 4, which is saved: the same command continues"
    assert read_outcome(tmp_path / "save") == Outcome(2, 4, Status.INTERRUPTED)

    codes, said = consolidate(train, tmp_path)
    assert codes == [1]
    assert "stage retrofit interrupted at iteration 2 of 4" in said

    codes, said = train(ranks=2, switches=PIPELINE)
    assert (codes, said) == ([0, 0], "stage finished at iteration 4")
    assert consolidate(train, tmp_path)[0] == [0]


def test_layout_stage_ended_by_its_ratio(train, tmp_path):
    codes, said = train(train_iters=20, dmc_stop_at_cr=1)
    assert codes == [0]
    assert said == "stage finished at iteration 10: a compression ratio of 1 is reached"
    assert train(train_iters=20, dmc_stop_at_cr=1) == (codes, said)
    lines = (tmp_path / "save" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 11))
    assert consolidate(train, tmp_path)[0] == [0]
    # A higher ratio goes on.
    assert train(switches=LONGER, train_iters=12, dmc_stop_at_cr=50) == ([0], "stage finished at iteration 12")


def test_layout_stop_file(train, tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    codes, said = train(dmc_stop_file=stop)
    assert codes == [75]
    assert said.startswith("stage interrupted at iteration 1 of 4")
    assert train(dmc_stop_file=stop, train_iters=1) == ([0], "stage finished at iteration 1")


def test_layout_more_steps_are_not_done_yet(train, tmp_path):
    assert train(train_iters=2)[0] == [0]
    assert train(switches=LONGER, train_iters=4, exit_interval=3)[0] == [75]
    assert consolidate(train, tmp_path)[0] == [1]


def test_layout_without_a_directory_nothing_is_saved(train):
    codes, said = train(save=None, exit_interval=1)
    assert codes == [75]
    assert said == "stage interrupted at iteration 1 of 4, which is lost: only with --save a run continues"

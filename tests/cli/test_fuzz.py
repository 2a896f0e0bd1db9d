"""Every command line ends in success, a refusal in words, or Megatron's message quoted: never in a traceback."""

import json
import os
import shutil

import pytest

from megatron_dmc.cli import main
from megatron_dmc.support.errors import (
    EXIT_CHECK_FAILED,
    EXIT_DONE,
    EXIT_INFRASTRUCTURE,
    EXIT_UNFINISHED,
    EXIT_USER_ERROR,
)
from tests.cli.command_lines import command_lines
from tests.inference.model_directory import TEXT, write_model
from tests.layouts.ranks import run_ranks

CODES = {EXIT_DONE, EXIT_USER_ERROR, EXIT_CHECK_FAILED, EXIT_INFRASTRUCTURE, EXIT_UNFINISHED}


def run_in(directory, arguments):
    """A command in a directory, training up to the point where the engine would start; its exit code."""
    os.chdir(directory)
    from megatron_dmc.runs.completeness import Outcome, Status
    from megatron_dmc.training import pretrain

    def checked(run, saved, observer):
        pretrain.configure(run)
        return Outcome(saved, run.train_iters or 0, Status.COMPLETE)

    pretrain._run_engine = checked
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code or 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with everything that the lines speak of."""
    place = tmp_path_factory.mktemp("fuzz") / "place"
    write_model(place / "hf")
    (place / "text.jsonl").write_text("".join(json.dumps({"text": part}) + "\n" for part in TEXT.split("\n") * 3))
    line = {"step": 1, "stage": "retrofit", "lm_loss": 2.0, "measured_cr": 1.0, "target_cr": 1.1}
    (place / "template.jinja").write_text("{{ messages[0]['content'] }}")
    (place / "done").mkdir()
    (place / "done" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    for made in ("data prepare text.jsonl --tokenizer hf --output data", "convert import hf base --no-verify"):
        assert run_ranks(run_in, 1, place / "logs", place, made.split()) == [0]
    return place


@pytest.fixture
def check(place, tmp_path):
    def checked(lines):
        wrong, codes = [], set()
        for number, line in enumerate(lines):
            here, logs = tmp_path / "here", tmp_path / f"logs{number}"
            shutil.copytree(place, here)
            (code,) = run_ranks(run_in, 1, logs, here, line)
            said = (logs / "rank0.log").read_text(errors="replace")
            told = code == EXIT_DONE or "megatron-dmc" in "".join(said.splitlines(keepends=True)[-12:])
            if code not in CODES or "Traceback" in said or not told:
                wrong.append(f"{code}: {line}\n{said[-1500:]}")
            codes.add(code)
            shutil.rmtree(here)
        assert {EXIT_DONE, EXIT_USER_ERROR} <= codes
        assert not wrong, f"{len(wrong)} of {len(lines)}:\n" + "\n\n".join(wrong)

    return checked


@pytest.mark.slow
def test_thirty_lines(check):
    check(command_lines(30, seed=1))


@pytest.mark.exhaustive
def test_two_hundred_lines(check):
    check(command_lines(200, seed=2))

"""Whether a stage is finished is recorded, never guessed from a number alone."""

import subprocess
import sys

import pytest

from megatron_dmc.runs.completeness import Outcome, Status, outcome_of, read_outcome, write_outcome
from megatron_dmc.runs.layout import OUTCOME_FILE


@pytest.mark.parametrize("status", Status)
def test_what_was_written_is_read(tmp_path, status):
    outcome = Outcome(3, 6, status, 2.5)
    write_outcome(tmp_path, outcome)
    assert read_outcome(tmp_path) == outcome
    assert outcome_of(tmp_path, 3, 6) == outcome
    assert outcome.finished == (status in (Status.COMPLETE, Status.RATIO_REACHED))
    assert outcome.exit_code == (0 if outcome.finished else 75)


@pytest.mark.parametrize(("iteration", "train_iters", "finished"), [(6, 6, True), (7, 6, True), (3, 6, False)])
def test_without_a_record_the_saved_length_decides(tmp_path, iteration, train_iters, finished):
    assert outcome_of(tmp_path, iteration, train_iters).finished == finished


def test_a_checkpoint_that_states_no_length_is_not_finished(tmp_path):
    assert not outcome_of(tmp_path, 6, None).finished


def test_the_record_of_another_checkpoint_says_nothing(tmp_path):
    write_outcome(tmp_path, Outcome(6, 6, Status.COMPLETE))
    assert not outcome_of(tmp_path, 8, 10).finished  # trained on, and killed
    assert outcome_of(tmp_path, 10, 10).finished


def test_a_stage_that_trains_on_is_not_finished(tmp_path):
    write_outcome(tmp_path, Outcome(6, 10, Status.RUNNING))
    assert not outcome_of(tmp_path, 6, 6).finished


@pytest.mark.parametrize(
    "text",
    ["[]", "{}", '{"iteration": "6", "train_iters": 6, "status": "complete", "stop_at_cr": null}', "{" * 10],
)
def test_a_damaged_record_is_refused(tmp_path, text):
    (tmp_path / OUTCOME_FILE).write_text(text)
    with pytest.raises(ValueError, match=OUTCOME_FILE):
        read_outcome(tmp_path)


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        (Outcome(6, 6, Status.COMPLETE), 0, "finished at iteration 6"),
        (Outcome(4, 6, Status.RATIO_REACHED, 2.5), 0, "a compression ratio of 2.5 is reached"),
        (Outcome(3, 6, Status.INTERRUPTED), 75, "interrupted at iteration 3 of 6"),
        (Outcome(3, 6, Status.RUNNING), 1, "running at iteration 3 of 6"),
        (None, 1, "no training has ended here"),
    ],
)
def test_a_script_is_told_by_the_exit_code(tmp_path, outcome, code, said):
    if outcome is not None:
        write_outcome(tmp_path, outcome)
    command = [sys.executable, "-m", "megatron_dmc.runs.completeness", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, said in done.stderr) == (code, True)

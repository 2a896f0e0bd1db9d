"""What is decided around the one call of Megatron's ``pretrain()``."""

import pytest

from megatron_dmc.runs.completeness import Outcome, Status, write_outcome
from megatron_dmc.support.errors import InfrastructureError
from megatron_dmc.training.loading import Confinement
from megatron_dmc.training.pretrain import Run, _check_saved, _finished_before, _without, prepare
from megatron_dmc.training.start import TRACKER, Start


def run(save, train_iters=6, stop_at_cr=None):
    return Run([], Start(None, resumes=True), Confinement(None), str(save), train_iters, stop_at_cr)


@pytest.mark.parametrize(
    ("saved", "train_iters", "finished"), [(6, 6, True), (7, 6, True), (5, 6, False), (5, None, False)]
)
def test_a_stage_with_all_its_steps_returns_at_once(tmp_path, saved, train_iters, finished):
    outcome = _finished_before(run(tmp_path, train_iters), saved)
    assert (outcome is not None) == finished


@pytest.mark.parametrize(
    ("recorded", "wanted", "finished"), [(2.5, 2.5, True), (2.5, 2.0, True), (2.5, 3.0, False), (2.5, None, False)]
)
def test_a_ratio_that_was_reached_is_not_trained_for_again(tmp_path, recorded, wanted, finished):
    write_outcome(tmp_path, Outcome(3, 6, Status.RATIO_REACHED, recorded))
    assert (_finished_before(run(tmp_path, stop_at_cr=wanted), 3) is not None) == finished
    assert _finished_before(run(tmp_path, stop_at_cr=wanted), 4) is None


def test_what_was_saved_is_believed_and_nothing_else(tmp_path):
    with pytest.raises(InfrastructureError, match="left without a checkpoint"):
        _check_saved(str(tmp_path), 3)
    (tmp_path / TRACKER).write_text("3")
    with pytest.raises(InfrastructureError, match="names iteration 3, whose files are missing"):
        _check_saved(str(tmp_path), 3)
    (tmp_path / "iter_0000003").mkdir()
    assert _check_saved(str(tmp_path), 3) == _check_saved(str(tmp_path), None) == 3
    with pytest.raises(InfrastructureError, match="left at iteration 4, .* holds only 3"):
        _check_saved(str(tmp_path), 4)
    assert _check_saved(None, 4) == 4


def test_a_continued_run_does_not_open_its_base_again():
    given = ["--pretrained-checkpoint", "base", "--lr", "1", "--pretrained-checkpoint=base"]
    assert _without(given, "--pretrained-checkpoint") == ["--lr", "1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dmc-stage", "retrofit", "--spec", "x"], "--spec: not supported with --dmc-stage retrofit"),
        (["--dmc-stage", "off", "--dataloader-inter-document-masking"], "not supported with --dmc-stage off"),
        (["--dmc-stage", "off", "--load", "a", "--save", "b"], "--load a: a stage continues from its own --save b"),
        (["--dmc-target-cr", "0.5"], "dmc_target_cr=0.5: must be >= 1"),
    ],
)
def test_wrong_flags_are_refused_before_megatron_is_imported(flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(flags)

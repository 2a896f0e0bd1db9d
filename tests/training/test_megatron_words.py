"""What Megatron raises becomes one message; our own exceptions stay as they are."""

import argparse
import sys

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.support.errors import InfrastructureError
from megatron_dmc.training.megatron_words import WORDS_LIMIT, failure, keep_traceback, refused_flags


def caught(function):
    """The exception of a call, with its way."""
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def raising(error):
    def function():
        raise error

    return function


def wordless():
    raise AssertionError


def test_an_assertion_without_a_text_is_told_by_its_line():
    told = failure(caught(wordless), "refuses these flags")
    assert isinstance(told, ValueError)
    assert str(told).startswith("Megatron refuses these flags: raise AssertionError (")
    assert "test_megatron_words.py:" in str(told)


@pytest.mark.parametrize(
    ("error", "words", "remedy"),
    [
        (
            AssertionError("world size (1) is not divisible by 2"),
            "world size (1) is not",
            "--tensor-model-parallel-size",
        ),
        (KeyError("rank"), "KeyError: 'rank'", "change or leave out"),
        (AssertionError("OptimizerParamScheduler: class input value 8"), "class input value 8", "--override-opt_param"),
        (RuntimeError("CUDA out of memory. Tried"), "RuntimeError: CUDA out of memory", "smaller --micro-batch-size"),
        (FileNotFoundError(2, "No such file", "x.idx"), "No such file", "change or leave out"),
    ],
)
def test_words_come_with_what_to_change(error, words, remedy):
    told = failure(caught(raising(error)), "cannot start")
    assert isinstance(told, ValueError)
    assert words in str(told)
    assert remedy in str(told)


def test_what_fails_in_the_course_of_training_is_not_the_users_fault():
    for error, started in ((RuntimeError("NaN"), True), (OSError(28, "No space left on device"), False)):
        told = failure(caught(raising(error)), "stopped behind iteration 3", started=started)
        assert isinstance(told, InfrastructureError)
        assert "Megatron stopped behind iteration 3: " in str(told)


def test_our_own_words_stay():
    for error in (caught(lambda: DMCConfig(target_cr=0.5)), caught(raising(InfrastructureError("lost")))):
        assert failure(error, "cannot start") is error


def test_long_words_are_cut_and_the_way_is_kept(tmp_path):
    error = caught(raising(RuntimeError("x" * 9999)))
    assert len(str(failure(error, "cannot start"))) < WORDS_LIMIT + 300
    log = keep_traceback(error, str(tmp_path / "save"))
    assert "Traceback" in log.read_text()
    assert "x" * 9999 in log.read_text()


def test_a_usage_error_is_one_message_without_the_usage(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float)
    words = "refuses these flags: argument --lr: invalid float value: 'x'; change"
    with pytest.raises(ValueError, match=words), refused_flags(lambda parser: parser):
        parser.parse_args(["--lr", "x"])
    assert capsys.readouterr().err == ""


def test_what_is_said_while_flags_are_read_is_passed_on(capsys):
    with refused_flags(lambda parser: parser):
        print("a warning", file=sys.stderr)
    with pytest.raises(SystemExit), refused_flags(lambda parser: parser):
        sys.exit(17)
    assert capsys.readouterr().err == "a warning\n"

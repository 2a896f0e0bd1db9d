"""Progress off a terminal: plain lines, now and then, with the time left once it means something."""

import sys

import pytest

from megatron_dmc.support import progress as module
from megatron_dmc.support.progress import position, progress


class Clock:
    """Stands in for the clock; ``wait`` moves it."""

    def __init__(self):
        self.now = 0.0

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


def test_position_tells_how_far():
    assert position(3, 1600, "steps") == "step 3 of 1,600"
    assert position(3, 12, "tokens") == "3 of 12 tokens"
    assert position(1e6, 2e6, "B") == "1.0 MB of 2.0 MB"
    assert position(3, None, "steps") == "3 steps"


def test_lines_say_how_long_it_takes(capsys, clock):
    with progress("training", 100, "steps", done=20) as advance:
        for _ in range(4):
            clock.wait(20)
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: step 30 of 100 (30%)"
    assert lines[1] == "training: step 40 of 100 (40%), 2 min 00 s left"
    assert lines[-1] == "training: 40 steps in 1 min 20 s"


def test_the_start_of_a_process_is_not_its_speed(capsys, clock):
    """A minute of start, then a step per second."""
    with progress("training", 1000, "steps") as advance:
        clock.wait(60)
        for _ in range(31):
            advance(1)
            clock.wait(1)
    shown = [line for line in capsys.readouterr().err.splitlines() if "left" in line]
    assert shown[0] == "training: step 21 of 1,000 (2%), 16 min 19 s left"


@pytest.mark.parametrize(("seconds_per_step", "steps"), [(1, 190), (9, 32)])
def test_no_time_left_is_said_before_it_means_something(capsys, clock, seconds_per_step, steps):
    """Neither before two in a hundred of the work nor before five minutes of slow work."""
    with progress("training", 10_000, "steps") as advance:
        for _ in range(steps):
            advance(1)
            clock.wait(seconds_per_step)
        assert "left" not in capsys.readouterr().err
        clock.wait(300)
        advance(20)
    assert "left" in capsys.readouterr().err


def test_fast_work_is_one_line(capsys):
    with progress("counting", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == "counting: 3 in 0 s\n"


def test_what_was_found_so_far_is_shown(capsys, clock):
    found = []
    with progress("evaluating", 20, "tokens", note=lambda: " ".join(found)) as advance:
        clock.wait(11)
        advance(5)
        found.append("perplexity 7.8")
        clock.wait(11)
        advance(5)
    assert capsys.readouterr().err.splitlines() == [
        "evaluating: 5 of 20 tokens (25%)",
        "evaluating: 10 of 20 tokens (50%), perplexity 7.8",
        "evaluating: 10 tokens in 22 s, perplexity 7.8",
    ]


def test_a_terminal_gets_a_bar_with_the_same_words(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("training", 1600, "steps", note=lambda: "loss [1]") as advance:
        advance(120)
    assert "step 120 of 1,600, loss [1]" in " ".join(capsys.readouterr().err.split())

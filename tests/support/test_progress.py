"""Progress off a terminal: plain lines, now and then, with the time left."""

from megatron_dmc.support import progress as module
from megatron_dmc.support.progress import position, progress


def test_position_tells_how_far():
    assert position(3, 12, "steps") == "3 of 12 steps"
    assert position(1e6, 2e6, "B") == "1.0 MB of 2.0 MB"
    assert position(3, None, "steps") == "3 steps"


def test_lines_say_how_long_it_takes(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    with progress("training", 100, "steps", done=20) as advance:
        for _ in range(4):
            now += 20
            advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "training: 30% (30 of 100 steps), 2 min 20 s left"
    assert lines[-1] == "training: 40 steps in 1 min 20 s"


def test_fast_work_is_one_line(capsys):
    with progress("counting", 3) as advance:
        advance(3)
    assert capsys.readouterr().err == "counting: 3 in 0 s\n"

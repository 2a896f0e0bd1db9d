"""Progress off a terminal: plain lines, now and then, with the time left."""

from megatron_dmc.support import progress as module
from megatron_dmc.support.progress import amount, duration, position, progress, track


def test_words():
    assert [duration(seconds) for seconds in (0.4, 59, 65, 3599, 7800)] == [
        "0 s",
        "59 s",
        "1 min 05 s",
        "59 min 59 s",
        "2 h 10 min",
    ]
    assert [amount(12, "steps"), amount(1500, "B"), amount(2.5e9, "B")] == ["12 steps", "1.5 kB", "2.5 GB"]
    assert position(3, 12, "steps") == "3 of 12 steps"
    assert position(1e6, 2e6, "B") == "1.0 MB of 2.0 MB"


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
    assert list(track([1, 2, 3], "counting")) == [1, 2, 3]
    assert capsys.readouterr().err == "counting: 3 in 0 s\n"

"""Directories and files that are old, or whole and new, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dmc.support import files
from megatron_dmc.support.files import free_space, read_json, write_json

WRITER = """
import sys, time
from pathlib import Path
from megatron_dmc.support.files import new_directory
destination, tag = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
while True:
    with new_directory(destination, overwrite=True) as partial:
        for number in range(20):
            (partial / f"file{number}").write_text(tag * 1000)
"""


def _content(directory: Path) -> set[str]:
    return {path.read_text()[:1] for path in directory.iterdir()}


def test_a_new_directory_appears_when_its_block_ends(tmp_path):
    destination = tmp_path / "a" / "b"
    with files.new_directory(destination) as partial:
        (partial / "x").write_text("1")
        assert not destination.exists()
    assert (destination / "x").read_text() == "1"
    assert [path.name for path in destination.parent.iterdir()] == ["b"]


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError), files.new_directory(tmp_path / "b") as partial:
        (partial / "absent" / "x").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_destination_needs_overwrite(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "old").write_text("old")
    with pytest.raises(ValueError, match="--overwrite"), files.new_directory(tmp_path / "b"):
        pass
    assert (tmp_path / "b" / "old").read_text() == "old"
    with files.new_directory(tmp_path / "b", overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replacing_with_and_without_the_exchange_of_the_kernel(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda first, second: False)
    for tag in "ab":
        with files.new_directory(tmp_path / "d", overwrite=True) as partial:
            (partial / "x").write_text(tag)
    assert (tmp_path / "d" / "x").read_text() == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_kill_between_the_two_renames_is_repaired_by_the_next_call(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    old = files._beside(tmp_path / "d", "old").with_name(f".d.{os.uname().nodename}.{int(dead.stdout)}.old")
    old.mkdir()
    (old / "x").write_text("old")
    with pytest.raises(ValueError, match="exists"), files.new_directory(tmp_path / "d"):
        pass
    assert (tmp_path / "d" / "x").read_text() == "old"


def test_sigkill_at_any_moment_leaves_one_whole_directory(tmp_path):
    """Kill a process that replaces a directory over and over; the delays sweep over its work."""
    destination = tmp_path / "d"
    with files.new_directory(destination) as partial:
        for number in range(20):
            (partial / f"file{number}").write_text("a" * 1000)
    for attempt in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(destination), "bc"[attempt % 2]], stdout=subprocess.PIPE
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        assert len(list(destination.iterdir())) == 20
        assert len(_content(destination)) == 1
    with files.new_directory(destination, overwrite=True) as partial:
        (partial / "x").write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_free_space_is_that_of_the_nearest_folder(tmp_path):
    folder, free = free_space(tmp_path / "not" / "there")
    assert (folder, free > 0) == (tmp_path, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1]", "holds a list"), ('{"a": 1, "a": 2}', "'a' appears twice"), ('{"a": NaN}', "NaN is not a JSON number")],
)
def test_json_is_read_with_care(tmp_path, text, message):
    (tmp_path / "file.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "file.json")
    with pytest.raises(ValueError, match="larger than the 2 bytes"):
        read_json(tmp_path / "file.json", 2)


def test_a_measured_value_may_be_no_number(tmp_path):
    (tmp_path / "file.json").write_text('{"perplexity": Infinity}')
    assert read_json(tmp_path / "file.json", finite=False) == {"perplexity": float("inf")}


def test_numbers_that_json_has_not_become_null(tmp_path):
    value = {"loss": float("nan"), "curve": [(1, float("inf")), (2, 0.5)], "deep": {"low": -float("inf")}, "n": 3}
    write_json(tmp_path / "value.json", value)
    null = {"loss": None, "curve": [[1, None], [2, 0.5]], "deep": {"low": None}, "n": 3}
    assert read_json(tmp_path / "value.json") == null

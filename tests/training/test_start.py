"""What a run may start from is decided before Megatron opens anything."""

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.training.start import TRACKER, find_start, saved_iteration


def test_compressing_from_random_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs trained weights"):
        find_start(DMCConfig(stage="retrofit"), str(tmp_path / "save"), None)


def test_training_from_scratch_needs_no_base(tmp_path):
    start = find_start(DMCConfig(stage="off"), str(tmp_path), None)
    assert (start.config, start.resumes, start.first_sample) == (None, False, 0)


def test_a_directory_without_a_tracker_is_no_base(tmp_path):
    with pytest.raises(ValueError, match=TRACKER):
        find_start(DMCConfig(stage="zero_out"), None, str(tmp_path))


@pytest.mark.parametrize(("text", "iteration"), [("12\n", 12), ("release", 0)])
def test_the_tracker_names_the_newest_checkpoint(tmp_path, text, iteration):
    (tmp_path / TRACKER).write_text(text)
    assert saved_iteration(tmp_path) == iteration


@pytest.mark.parametrize("content", [b"", b"\n", b"twelve", b"1e3", b"-1", b"\xff\xfe", b"1" * 100_000])
def test_a_tracker_that_names_nothing_is_named(tmp_path, content):
    (tmp_path / TRACKER).write_bytes(content)
    with pytest.raises(ValueError, match=TRACKER):
        saved_iteration(tmp_path)


def test_no_tracker_is_no_checkpoint(tmp_path):
    assert saved_iteration(tmp_path) is None
    assert saved_iteration(None) is None

"""The teacher of a distilled run is found, and refused by name, before Megatron opens anything."""

import dataclasses
import os

import pytest

from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments
from megatron_dmc.config import DMCConfig
from megatron_dmc.training.start import Start, find_start
from megatron_dmc.training.teacher_choice import find_teacher, with_teacher
from tests.checkpoint.conftest import legacy, torch_dist  # noqa: F401

DISTILLED = DMCConfig(stage="zero_out", distill="forward")
ADAPTERS = DMCConfig("dms", decision_source="adapter", train="decisions", distill="forward")


@pytest.fixture
def base(torch_dist):  # noqa: F811
    """Directory and model of a plain checkpoint."""
    return str(torch_dist.parent), read_saved_arguments(torch_dist.parent).config


def test_the_base_of_the_first_stage_teaches(base):
    directory, _ = base
    start = with_teacher(find_start(DISTILLED, None, directory), DISTILLED, None)
    assert start.origin == os.path.realpath(directory)
    assert os.path.realpath(start.teacher.location.root) == start.origin
    assert with_teacher(start, ADAPTERS, None).teacher is None


@pytest.mark.parametrize(
    "settings",
    [DMCConfig(stage="zero_out"), ADAPTERS, DMCConfig(stage="off", distill="forward")],
    ids=["nobody_learns", "adapters", "off"],
)
def test_no_copy_is_kept_where_none_is_needed(settings):
    assert find_teacher(settings, None, None) is None


def test_nobody_knows_a_teacher():
    with pytest.raises(ValueError, match=r"--dmc-distill forward needs a teacher: give --dmc-teacher DIR"):
        find_teacher(DISTILLED, None, None)


@pytest.mark.parametrize(("name", "value"), [("vocab_size", 7), ("hidden_size", 8), ("rms_norm_eps", 1e-3)])
def test_a_teacher_of_another_model_is_refused(base, name, value):
    directory, config = base
    student = dataclasses.replace(config, **{name: value})
    with pytest.raises(ValueError, match=f"another model than the student; it has {name}={getattr(config, name)!r}, "):
        find_teacher(DISTILLED, directory, student)


def test_its_numbers_may_be_stored_in_another_type(base):
    directory, config = base
    assert find_teacher(DISTILLED, directory, dataclasses.replace(config, dtype="bfloat16"))


def test_a_teacher_must_be_plain_and_in_the_layout_that_is_read(legacy, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="no torch_dist checkpoint"):
        find_teacher(DISTILLED, str(legacy.parent), None)
    with pytest.raises(ValueError, match="--dmc-teacher .*nothing: no such directory; give --dmc-teacher DIR"):
        find_teacher(DISTILLED, str(tmp_path / "nothing"), None)


def test_a_flag_without_a_meaning_is_refused():
    start = Start(config=None, resumes=False)
    with pytest.raises(ValueError, match="nothing learns from it"):
        with_teacher(start, DMCConfig(), "DIR")
    with pytest.raises(ValueError, match="the model itself teaches"):
        with_teacher(start, ADAPTERS, "DIR")

"""A run loads what was checked, and a flag that would load something else is refused by name."""

import shutil
from types import SimpleNamespace

import pytest

from megatron_dmc.checkpoint.guard import CheckedCheckpoint, examine
from megatron_dmc.checkpoint.locate import TRACKER
from megatron_dmc.training.loading import REFUSED_FLAGS, Confinement, refuse_loading_flags
from megatron_dmc.training.start import saved_iteration
from tests.checkpoint.conftest import torch_dist  # noqa: F401

ARGS = SimpleNamespace(ckpt_step=None, non_persistent_ckpt_type=None, use_checkpoint_args=False, yaml_cfg=None)


@pytest.fixture
def checked(torch_dist) -> CheckedCheckpoint:  # noqa: F811
    return examine(torch_dist.parent)


@pytest.mark.parametrize("flag", REFUSED_FLAGS)
@pytest.mark.parametrize("spelling", ["{} 2", "{}=2", "{}"])
def test_flags_that_load_something_else_are_refused(flag, spelling):
    with pytest.raises(ValueError, match=f"^{flag} is not supported"):
        refuse_loading_flags(["--seq-length", "64", *spelling.format(flag).split(), "--swiglu"])


@pytest.mark.parametrize("given", ["--ckpt-format fsdp_dtensor", "--ckpt-format=torch_dcp"])
def test_formats_that_nobody_checks_are_refused(given):
    with pytest.raises(ValueError, match="--ckpt-format"):
        refuse_loading_flags(given.split())


def test_other_flags_pass():
    refuse_loading_flags(["--ckpt-format", "torch_dist", "--save", "x", "--no-load-rng", "--ckpt-fully-parallel-load"])


def test_megatron_knows_every_flag_that_is_refused():
    import importlib.util
    from pathlib import Path

    folder = Path(importlib.util.find_spec("megatron.core").origin).parents[1] / "training"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.py"))
    for flag in REFUSED_FLAGS:
        assert flag in text or flag.removeprefix("--").replace("-", "_") + ":" in text, flag


def test_the_choice_that_was_checked_passes(checked):
    Confinement(checked).check_choice(str(checked.location.root), ARGS)


@pytest.mark.parametrize("name", ["ckpt_step", "non_persistent_ckpt_type", "use_checkpoint_args", "yaml_cfg"])
def test_another_choice_is_refused_where_megatron_makes_it(checked, name):
    args = SimpleNamespace(**{**vars(ARGS), name: 2})
    with pytest.raises(ValueError, match=name.replace("_", "-")):
        Confinement(checked).check_choice(str(checked.location.root), args)


def test_another_directory_is_refused_where_megatron_chooses_it(checked, tmp_path):
    for other in (None, str(tmp_path)):
        with pytest.raises(ValueError, match="was checked"):
            Confinement(checked).check_choice(other, ARGS)


def test_a_run_from_scratch_loads_nothing(tmp_path):
    confinement = Confinement(None)
    confinement.check_choice(str(tmp_path), ARGS)
    with pytest.raises(ValueError, match="starts from no checkpoint"):
        confinement.open(tmp_path / "x")
    (tmp_path / TRACKER).write_text("5")
    with pytest.raises(ValueError, match="appeared"):
        confinement.check_choice(str(tmp_path), ARGS)


def test_only_files_that_were_checked_are_opened(checked):
    directory = checked.location.directory
    with checked.open(directory / ".metadata") as stream:
        assert stream.read(1) == b"\x80"
    (directory / "more.distcp").write_bytes(b"x")
    with pytest.raises(ValueError, match="not one of the files"):
        checked.open(directory / "more.distcp")


def test_a_teachers_files_are_opened_beside_them(checked, tmp_path):
    shutil.copytree(checked.location.root, tmp_path / "teacher")
    teacher = examine(tmp_path / "teacher")
    file = teacher.location.directory / ".metadata"
    Confinement(checked, teacher).open(file).close()
    with pytest.raises(ValueError, match="not one of the files"):
        Confinement(checked).open(file)
    file.touch()
    with pytest.raises(ValueError, match="changed after it was checked"):
        Confinement(checked, teacher).open(file)
    with pytest.raises(ValueError, match="was checked"):
        Confinement(checked, teacher).check_choice(str(teacher.location.root), ARGS)


@pytest.mark.parametrize("change", ["replaced", "rewritten", "touched"])
def test_a_file_that_changed_is_not_opened(checked, change):
    path = checked.location.directory / ".metadata"
    data = path.read_bytes()
    if change == "replaced":
        path.unlink()
    if change != "touched":
        path.write_bytes(data)
    else:
        path.touch()
    with pytest.raises(ValueError, match="changed after it was checked"):
        checked.open(path)


def test_a_refusal_that_megatron_swallows_is_told():
    confinement = Confinement(None)

    def engine():
        try:
            confinement.keeping(confinement.open)("x")
        except ValueError:
            raise SystemExit from None

    with pytest.raises(ValueError, match="x is refused"), confinement.telling():
        engine()


def test_a_tracker_that_is_no_file_is_refused(tmp_path):
    import os

    os.mkfifo(tmp_path / TRACKER)
    with pytest.raises(ValueError, match="named pipe"):
        saved_iteration(tmp_path)

"""Hostile checkpoints through every command that reads one: refused, told why, nothing executed, nothing hangs."""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dmc import cli
from tests.checkpoint.five_ways import WAYS
from tests.checkpoint.hostile import kinds
from tests.checkpoint.hostile_ranks import legacy_kinds
from tests.checkpoint.victim import FLAGS

ROOT = Path(__file__).parents[2]
SECONDS = 20
MEMORY_GROWTH = 1 << 28

KINDS = kinds()
LEGACY_KINDS = legacy_kinds()


def commands(root: Path, folder: Path) -> dict[str, list[str]]:
    """Every command, with the checkpoint in ``root``."""
    hf, out = str(folder / "hf"), str(folder / "out")
    return {
        "inspect": ["convert", "inspect", str(root)],
        "verify": ["convert", "verify", hf, str(root)],
        "export": ["convert", "export", str(root), out],
        "pretrained": ["train", *FLAGS, "--pretrained-checkpoint", str(root), "--save", out],
        "resume": ["train", *FLAGS, "--save", str(root)],
        "evaluate": ["evaluate", "--model", str(root), "--text", __file__],
        "generate": ["generate", "--model", str(root), "--prompt", "x"],
    }


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> Path:
    """A folder with a model and its checkpoints in both layouts."""
    from checkpoints_convert.hf_to_megatron import import_checkpoint
    from checkpoints_convert.megatron_writer import MegatronLayout
    from checkpoints_convert.options import Options
    from tests.checkpoints_convert.models import write_model

    folder = tmp_path_factory.mktemp("honest")
    write_model(folder / "hf")
    import_checkpoint(folder / "hf", folder / "torch_dist", options=Options(verify=False))
    layout = MegatronLayout("torch", 1, 1)
    import_checkpoint(folder / "hf", folder / "legacy", layout=layout, options=Options(verify=False))
    return folder


def _refused(argv: list[str], marker: Path, capsys) -> str:
    """Run a command and return what it says; it must refuse."""
    before = time.monotonic()
    code = cli.main(argv)
    told = capsys.readouterr()
    assert code == 1, told
    assert not marker.exists()
    assert time.monotonic() - before < SECONDS
    message = told.err.strip().splitlines()[-1]
    assert message.startswith("megatron-dmc: ")
    assert len(message) < 1000
    return message


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_checkpoint_is_refused_by_every_command(honest, tmp_path, kind, capsys):
    root, marker = tmp_path / "checkpoint", tmp_path / "marker"
    (tmp_path / "hf").symlink_to(honest / "hf")
    shutil.copytree(honest / "torch_dist", root)
    KINDS[kind](root / "release", marker)
    peak = _peak()
    for argv in commands(root, tmp_path).values():
        _refused(argv, marker, capsys)
    assert _peak() - peak < MEMORY_GROWTH
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", LEGACY_KINDS)
def test_a_hostile_rank_is_refused_by_every_command(honest, tmp_path, kind, capsys):
    root, marker = tmp_path / "checkpoint", tmp_path / "marker"
    (tmp_path / "hf").symlink_to(honest / "hf")
    shutil.copytree(honest / "legacy", root)
    LEGACY_KINDS[kind](root / "release", marker)
    every = commands(root, tmp_path)
    every["import"] = ["convert", "import-dmc-release", str(root), str(tmp_path / "out"), "--target-cr", "2"]
    for argv in every.values():
        _refused(argv, marker, capsys)


@pytest.mark.parametrize("kind", LEGACY_KINDS)
def test_a_hostile_release_is_refused(honest, tmp_path, kind, capsys):
    """Ranks beside the tracker, as the published models have them."""
    root, marker = tmp_path / "checkpoint", tmp_path / "marker"
    shutil.copytree(honest / "legacy" / "release", root)
    (root / "latest_checkpointed_iteration.txt").write_text("2000")
    LEGACY_KINDS[kind](root, marker)
    _refused(["convert", "import-dmc-release", str(root), str(tmp_path / "out"), "--target-cr", "2"], marker, capsys)


def test_there_are_as_many_kinds_as_promised():
    assert len(KINDS) + 2 * len(LEGACY_KINDS) >= 80


def test_the_honest_ones_pass(honest, tmp_path, capsys):
    for layout in ("torch_dist", "legacy"):
        assert cli.main(["convert", "inspect", str(honest / layout)]) == 0
        assert cli.main(["convert", "export", str(honest / layout), str(tmp_path / layout), "--no-verify"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_way_that_was_open_is_closed(honest, tmp_path, way):
    """In a process of its own, up to the point where Megatron would load."""
    root, marker = tmp_path / "checkpoint", tmp_path / "marker"
    shutil.copytree(honest / "torch_dist", root)
    flags = WAYS[way](root, marker)
    argv = [sys.executable, "-m", "tests.checkpoint.victim", str(root), str(tmp_path / "save"), *flags]
    finished = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert finished.returncode == 1, finished.stderr[-2000:]
    assert "megatron-dmc: " in finished.stderr
    assert not marker.exists()


@pytest.mark.slow
def test_without_a_plant_the_same_run_ends_well(honest, tmp_path):
    shutil.copytree(honest / "torch_dist", tmp_path / "checkpoint")
    argv = [sys.executable, "-m", "tests.checkpoint.victim", str(tmp_path / "checkpoint"), str(tmp_path / "save")]
    finished = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr[-2000:]

"""SIGKILL while a checkpoint is converted: the old one or the whole new one, never a part that loads."""

import multiprocessing
import os
import signal
import time

import pytest

from checkpoints_convert import megatron_writer
from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.options import Options
from megatron_dmc.checkpoint.manifest import manifest_problems
from megatron_dmc.checkpoint.source import open_source
from tests.checkpoints_convert.models import write_model

ATTEMPTS = 12
CONVERT = {"import": import_checkpoint, "export": export_checkpoint}


def _convert_in_turn(direction, sources, destination, ready) -> None:
    """Replace the destination by one model, then the other, without end."""
    ready.set()
    while True:
        for source in sources:
            CONVERT[direction](source, destination, options=Options(overwrite=True, verify=False))


@pytest.mark.parametrize("direction", ["import", "export"])
def test_the_destination_is_always_whole(tmp_path, direction):
    sources = [write_model(tmp_path / f"hf{seed}", seed=seed) for seed in (1, 2)]
    if direction == "export":
        for number, source in enumerate(sources):
            import_checkpoint(source, tmp_path / f"m{number}", options=Options(verify=False))
        sources = [tmp_path / "m0", tmp_path / "m1"]
    destination = tmp_path / "out" / "model"
    CONVERT[direction](sources[0], destination, options=Options(verify=False))
    expected = [open_source(source).tensor("model.norm.weight").tolist() for source in sources]
    context = multiprocessing.get_context("fork")
    for attempt in range(ATTEMPTS):
        ready = context.Event()
        converter = context.Process(target=_convert_in_turn, args=(direction, sources, destination, ready))
        converter.start()
        ready.wait()
        time.sleep(0.02 + 0.013 * attempt)
        converter.kill()
        converter.join()
        found = open_source(destination)
        assert found.tensor("model.norm.weight").tolist() in expected
        assert manifest_problems(found.directory) == []
    CONVERT[direction](sources[1], destination, options=Options(overwrite=True, verify=False))
    assert [path.name for path in destination.parent.iterdir()] == ["model"]


def test_a_conversion_that_was_killed_before_its_end_leaves_no_checkpoint(tmp_path):
    """Killed at its first write: the destination does not exist, and what is beside it does not load by its name."""
    source = write_model(tmp_path / "hf")
    killed = multiprocessing.get_context("fork").Process(target=_die_before_the_manifest, args=(source, tmp_path))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "m").exists()
    (left,) = (tmp_path / "out").iterdir()
    assert left.name.endswith(".partial")
    import_checkpoint(source, tmp_path / "out" / "m", options=Options(verify=False))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["m"]


def _die_before_the_manifest(source, folder) -> None:
    megatron_writer.write_manifest = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    import_checkpoint(source, folder / "out" / "m")

"""A stage that release 0.1.0 has left unfinished is seen as such, and goes on."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dmc.config import DMCConfig
from megatron_dmc.training.start import find_start

FLAGS = "--dmc-stage zero_out --seq-length 16 --micro-batch-size 1 --global-batch-size 2 --mock-data --eval-iters 0"
VOCABULARY = "--make-vocab-size-divisible-by 4 --dmc-total-samples 100"


@pytest.fixture
def stage(tmp_path):
    """The stage ``zero_out``, after step 1 of 2."""
    shutil.copytree(Path(__file__).parent / "zero_out_of_0_1_0", tmp_path / "zero_out")
    return tmp_path / "zero_out"


def test_it_is_no_base_before_it_is_finished(stage):
    with pytest.raises(ValueError, match="stage zero_out interrupted at iteration 1 of 2; give its own command again"):
        find_start(DMCConfig(stage="retrofit"), None, str(stage))


def test_it_continues_with_the_settings_it_was_saved_with(stage):
    start = find_start(DMCConfig(stage="zero_out"), str(stage), None)
    assert (start.resumes, start.first_sample, start.config.num_layers) == (True, 0, 1)


@pytest.mark.slow
def test_it_is_trained_to_its_end(stage):
    command = [sys.executable, "-m", "megatron_dmc", "train", *FLAGS.split(), *VOCABULARY.split()]
    command += ["--train-iters", "2", "--save", str(stage), "--save-interval", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "stage finished at iteration 2"
    start = find_start(DMCConfig(stage="retrofit"), None, str(stage))
    assert (start.clears_rows, start.first_sample) == (True, 4)

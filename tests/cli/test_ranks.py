"""``generate`` as torchrun starts it: the texts of one process, printed once, and one message when a rank fails."""

import json
import subprocess
import sys

import pytest

from megatron_dmc.cli import main
from megatron_dmc.cli.model_options import device_of
from megatron_dmc.config import DMCConfig
from megatron_dmc.inference.decoder.parallel import TensorParallel
from tests.inference.model_directory import write_model

OPTIONS = ["--max-new-tokens", "30", "--ignore-eod", "--prompt", "def step_7(x):", "--prompt", "    return"]
SABOTAGE = """
import os, sys
from megatron_dmc.cli import main
from megatron_dmc.inference.decoder.decoder import Decoder
read, passes = Decoder.read, []
def fail(*args, **kwargs):
    passes.append(1)
    if len(passes) == 9 and os.environ["RANK"] == "1":
        {failure}
    return read(*args, **kwargs)
Decoder.read = fail
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ranks") / "model"
    write_model(directory, DMCConfig(decision_bias=-1.0))
    return directory


def torchrun(num_ranks, *command):
    """What ``command`` printed on so many ranks."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), *map(str, command)]
    return subprocess.run(run, capture_output=True, text=True, timeout=300, check=False)


def said(finished):
    """The messages of the program among what torchrun prints when a rank fails."""
    return [line for line in finished.stderr.splitlines() if line.startswith("megatron-dmc: ")]


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--num-blocks", "20"], ["--policy", "tova", "--budget", "8"]])
def test_two_ranks_print_what_one_process_prints(model, options, capsys):
    """Where a small cache lets requests wait for one another, and where ranks take means over their heads."""
    command = ["generate", "--model", str(model), "--json", *OPTIONS, *options]
    assert main(command) == 0
    expected = json.loads(capsys.readouterr().out)
    finished = torchrun(2, "-m", "megatron_dmc", *command)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert found.pop("speed").keys() == expected.pop("speed").keys()
    assert found == expected
    assert finished.stderr.count("a prompt begins with") == 1


@pytest.mark.slow
def test_what_all_ranks_refuse_is_said_once(model):
    finished = torchrun(3, "-m", "megatron_dmc", "generate", "--model", model, *OPTIONS)
    assert finished.returncode != 0
    assert finished.stdout == ""
    (line,) = said(finished)
    assert "3 ranks cannot share 2 KV heads equally: start 1 or 2 with torchrun" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("raise ValueError('a problem of this rank alone')", "a problem of this rank alone"),
        ("os._exit(9)", "another rank has ended, torchrun says which and how"),
    ],
)
def test_a_rank_that_fails_alone_ends_all(failure, message, model, tmp_path):
    script = tmp_path / "sabotage.py"
    script.write_text(SABOTAGE.format(failure=failure))
    finished = torchrun(2, script, "generate", "--model", model, *OPTIONS)
    assert finished.returncode != 0
    (line,) = said(finished)
    assert message in line


def test_other_commands_run_on_one_process(model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["evaluate", "--model", str(model), "--data", str(model / "text")]) == 1
    assert "this command runs on one process: start it without torchrun" in capsys.readouterr().err


def test_ranks_do_not_share_a_gpu():
    with pytest.raises(ValueError, match="--device cuda:0: every rank needs a GPU of its own; give --device cuda"):
        device_of("cuda:0", TensorParallel(2, 1))


def test_usage_errors_are_told_by_the_first_rank(capsys, monkeypatch):
    for rank, is_told in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="^1$"):
            main(["generate"])
        assert bool(capsys.readouterr().err) == is_told

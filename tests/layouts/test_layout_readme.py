"""The commands of README's quick start do what they say, as they stand there: only lengths and the model are small."""

import json
import os
import re
import shlex
from pathlib import Path

from megatron_dmc.cli import main
from tests.inference.model_directory import write_model
from tests.layouts.ranks import run_ranks
from tests.test_documents import ROOT, commands


def run_in(directory, arguments):
    """A command of ``megatron-dmc`` in a directory; its exit code."""
    os.chdir(directory)
    return main(arguments)


def test_layout_the_commands_of_the_readme_run_one_after_the_other(tmp_path):
    write_model(tmp_path / "Llama-2-7b-hf", max_position_embeddings=256)
    texts = [f"def step_{n}(x):\n    return x * {n} + {n * n}\n" for n in range(600)]
    Path(tmp_path, "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    quick_start = (ROOT / "README.md").read_text().partition("## Results")[0]
    lines = [line for line in commands(ROOT / "README.md") if line.startswith("megatron-dmc ") and line in quick_start]
    assert {shlex.split(line)[1] for line in lines} >= {"doctor", "data", "convert", "train", "evaluate", "generate"}
    for number, line in enumerate(lines):
        arguments = shlex.split(re.sub(r"--train-iters [0-9]+", "--train-iters 2", line))[1:]
        logs = tmp_path / f"logs{number}"
        (code,) = run_ranks(run_in, 1, logs, tmp_path, arguments)
        assert code == 0, f"{line}\n{(logs / 'rank0.log').read_text()[-2000:]}"
    assert (tmp_path / "run" / "report" / "report.md").is_file()

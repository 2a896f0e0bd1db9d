"""Imported checkpoints in Megatron itself, at TP 1 and 2 and PP 1 and 2: transformers' logits."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_writer import ANY_LAYOUT, MegatronLayout
from checkpoints_convert.options import Options
from tests.checkpoints_convert.models import VARIANTS, transformers_logits, write_with_transformers

pytest.importorskip("transformers")
pytest.importorskip("megatron.core")

TOKENS = [[1, 5, 200, 7, 64, 64, 2], [3, 3, 100, 9, 255, 0, 11]]
CHECKED = ("mha", "gqa", "tied", "bf16", "llama3", "linear", "qwen2", "qwen3")
TOLERANCE = 2e-5  # of the largest logit: rounding of four layers in float32


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Per variant: the Hugging Face directory, and Megatron checkpoints in every format that is loaded below."""
    root = tmp_path_factory.mktemp("imported")
    for variant in CHECKED:
        source = write_with_transformers(root / variant / "hf", VARIANTS[variant])
        import_checkpoint(source, root / variant / "torch_dist", layout=ANY_LAYOUT, options=Options(verify=False))
        for tensor, pipeline in ((1, 1), (2, 1), (1, 2), (2, 2)):
            layout = MegatronLayout("torch", tensor, pipeline, transformer_impl="local")
            target = root / variant / f"legacy_{tensor}_{pipeline}"
            import_checkpoint(source, target, layout=layout, options=Options(verify=False))
    return root


def _run_megatron(folder, tensor: int, pipeline: int, jobs: list[dict]) -> None:
    work = folder / "jobs.json"
    work.write_text(json.dumps({"tensor": tensor, "pipeline": pipeline, "jobs": jobs}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = tensor * pipeline
    environment = dict(os.environ, WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.checkpoints_convert.megatron_worker", str(work)]
    ranks = [
        subprocess.Popen(command, env=dict(environment, RANK=str(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    told = [rank.communicate(timeout=500)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * size, told[0][-3000:]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_layout_of_megatron_gives_transformers_logits(imported, tmp_path, tensor, pipeline):
    jobs = [
        {
            "checkpoint": str(imported / variant / name),
            "tokens": TOKENS,
            "logits": str(tmp_path / f"{variant}_{name}.pt"),
        }
        for variant in CHECKED
        for name in ("torch_dist", f"legacy_{tensor}_{pipeline}")
    ]
    _run_megatron(tmp_path, tensor, pipeline, jobs)
    for variant in CHECKED:
        expected = transformers_logits(imported / variant / "hf", TOKENS)
        for name in ("torch_dist", f"legacy_{tensor}_{pipeline}"):
            logits = torch.load(tmp_path / f"{variant}_{name}.pt")
            assert logits.shape == expected.shape
            error = float((logits - expected).abs().max() / expected.abs().max())
            assert error < TOLERANCE, (variant, name, error)

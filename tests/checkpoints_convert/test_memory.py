"""Memory of a conversion does not grow with depth."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_convert.sizes import conversion_bytes, largest_layer_bytes
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape, padded_vocab_size
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.tensors import by_hf_name

WIDE = ModelConfig(1024, 2, 8, 8, 128, 4096, 1000, 128, dtype="bfloat16")

# Converts there and back at each depth, and reports the peaks of anonymous memory that a thread sampled meanwhile.
PROGRAM = """
import json, re, sys, threading
from checkpoints_convert.hf_to_megatron import import_checkpoint
from checkpoints_convert.megatron_to_hf import export_checkpoint
from checkpoints_convert.megatron_writer import MegatronLayout
from checkpoints_convert.options import Options

def anonymous():
    text = open("/proc/self/status").read()
    return 1024 * sum(int(re.search(rf"{name}:\\s+(\\d+)", text)[1]) for name in ("RssAnon", "RssShmem"))

peak = 0
def sample():
    global peak
    while True:
        peak = max(peak, anonymous())
        threading.Event().wait(0.001)
threading.Thread(target=sample, daemon=True).start()
layout = MegatronLayout(*json.loads(sys.argv[1]))
for folder in sys.argv[2:]:
    peak = 0
    import_checkpoint(folder + "/hf", folder + "/m", layout=layout, options=Options(verify=False))
    export_checkpoint(folder + "/m", folder + "/back", options=Options(verify=False))
    print(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["torch_dist"], ["torch", 2, 2]], ids=["torch_dist", "legacy"])
def test_the_peak_is_that_of_one_layer_whatever_the_depth(tmp_path, layout):
    folders = [tmp_path / str(num_layers) for num_layers in (2, 10)]
    for folder in folders:
        _write_zeros(folder / "hf", dataclasses.replace(WIDE, num_layers=int(folder.name)))
    command = [sys.executable, "-c", PROGRAM, json.dumps(layout), *map(str, folders)]
    # Freed blocks go back to the system at once, as those of a large model do; small ones would stay in the heap.
    environment = dict(os.environ, OMP_NUM_THREADS="1", MALLOC_MMAP_THRESHOLD_="65536")
    finished = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    shallow, deep = map(int, finished.stdout.split())
    layer = largest_layer_bytes(WIDE)
    assert deep - shallow < layer
    assert deep <= 2 * layer + (1 << 30)
    assert deep <= conversion_bytes(MegatronShape(WIDE, padded_vocab_size(WIDE.vocab_size)))


def _write_zeros(directory: Path, config: ModelConfig) -> None:
    directory.mkdir(parents=True)
    dtype = getattr(torch, config.dtype)
    names = by_hf_name(config).items()
    tensors = {name: torch.zeros(entry.hf_shapes(config)[place], dtype=dtype) for name, (entry, place) in names}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(to_hf_config(config)))

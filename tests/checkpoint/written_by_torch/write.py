"""Writes the folder of the running torch: ``python write.py`` under the release to be kept.

It needs torch alone. ``state.pt`` is written to a path, ``stream.pt`` to a file object; ``distributed`` is what
torch's own distributed checkpoint writer makes of the same tensors.
"""

import io
import warnings
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp


def known_state() -> dict:
    """Tensors of several types, one of them empty, and settings."""
    whole = torch.arange(24, dtype=torch.float32).view(4, 6)
    return {
        "args": Namespace(num_layers=2, name="llama", params_dtype=torch.bfloat16),
        "model": OrderedDict(w=whole, tail=whole[2:], half=torch.ones(3).half(), bf16=torch.ones(2).bfloat16()),
        "empty": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "state": io.BytesIO(),
        "size": torch.Size([4, 6]),
        "iteration": 7,
    }


def main() -> None:
    """Write the folder beside this file."""
    warnings.simplefilter("ignore")
    folder = Path(__file__).parent / torch.__version__.partition("+")[0]
    folder.mkdir()
    state = known_state()
    torch.save(state, folder / "state.pt")
    with open(folder / "stream.pt", "wb") as stream:
        torch.save(state, stream)
    tensors = {"w": state["model"]["w"], "half": state["model"]["half"], "args": state["args"]}
    writer = dcp.FileSystemWriter(folder / "distributed", single_file_per_rank=True, thread_count=1)
    if hasattr(dcp, "save"):
        dcp.save(tensors, storage_writer=writer)
    else:  # torch 2.1
        dcp.save_state_dict(tensors, storage_writer=writer, no_dist=True)


if __name__ == "__main__":
    main()

"""One forward pass over a checkpoint, layer by layer, in a process of its own.

Run as ``python -m checkpoints_convert.forward JOB.json``. The layers are those of another code base than this one:
transformers' for a Hugging Face directory, Megatron's for a Megatron checkpoint; the weights of one layer are in
memory at a time, and everything is computed in float32 on the CPU. A process of its own, because Megatron on the
CPU changes the process it runs in (``megatron_dmc.seam.host``), and to give the memory back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_dmc.checkpoint.locate import HUGGING_FACE, locate
from megatron_dmc.seam import host
from megatron_dmc.support.errors import CheckFailed

LOGITS = "logits"
_VOCABULARY_BLOCK = 8192


@dataclass(frozen=True)
class ForwardJob:
    """What to compute.

    Attributes:
        path: the checkpoint.
        tokens: ids, rows of equal length.
        layers: number of layers to walk; without all of them there are no logits.
        clears_borrowed: zero the rows of borrowed channels, as an export to plain Llama does.
        vocab_size: real rows of the vocabulary.
        ignored_settings: as :class:`checkpoints_convert.options.Options` has them.
        output: safetensors file for the results.
    """

    path: str
    tokens: list[list[int]]
    layers: int
    clears_borrowed: bool
    vocab_size: int
    output: str = ""
    ignored_settings: Sequence[str] = ()


class LayerwiseModel(Protocol):
    """A model that is walked one layer at a time; hidden states are ``[B, S, h]`` in float32."""

    num_layers: int

    def embed(self, tokens: Tensor) -> Tensor:
        """Rows of the embedding."""

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """One layer."""

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The norm before the output layer."""

    def output_weight(self) -> Tensor:
        """Weight of the output layer in its stored type."""


def run_forward(job: ForwardJob) -> dict[str, Tensor]:
    """Hidden states (``embedding``, ``layer 0``, ...) and ``logits`` of a checkpoint, from a new process.

    Raises:
        CheckFailed: transformers or megatron-core is absent, or the process failed; the message ends with its own.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_dmc_forward_") as folder:
        output = Path(folder, "states.safetensors")
        description = Path(folder, "job.json")
        description.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(job, output=str(output)))))
        environment = dict(os.environ, CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
        finished = subprocess.run(
            [sys.executable, "-m", "checkpoints_convert.forward", str(description)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if finished.returncode != 0:
            told = finished.stderr.strip().splitlines()[-1:] or [f"exit code {finished.returncode}"]
            raise CheckFailed(f"the forward pass of {job.path} could not be made: {told[0]}")
        return load_file(output)


def states(model: LayerwiseModel, job: ForwardJob) -> Iterator[tuple[str, Tensor]]:
    """Walk a model and yield what it computes on the way."""
    hidden = model.embed(torch.tensor(job.tokens))
    yield "embedding", hidden
    for index in range(min(job.layers, model.num_layers)):
        hidden = model.layer(index, hidden)
        yield f"layer {index}", hidden
    if job.layers >= model.num_layers:
        hidden = model.final_norm(hidden)
        weight = model.output_weight()[: job.vocab_size]
        blocks = [hidden @ rows.float().T for rows in weight.split(_VOCABULARY_BLOCK)]
        yield LOGITS, torch.cat(blocks, dim=-1)


def _open(job: ForwardJob) -> LayerwiseModel:
    path = Path(job.path)
    if locate(path).format == HUGGING_FACE:
        try:
            from checkpoints_convert.forward_transformers import TransformersModel
        except ImportError as error:
            raise SystemExit(f"transformers is needed for the logits of a Hugging Face model ({error})") from error
        return TransformersModel(path, job.clears_borrowed, job.ignored_settings)
    try:
        host.use_cpu()
        from checkpoints_convert.forward_megatron import MegatronModel
    except ImportError as error:
        raise SystemExit(f"megatron-core is needed for the logits of a Megatron checkpoint ({error})") from error
    return MegatronModel(path, job.clears_borrowed)


def main(description: Path) -> None:
    """Compute the job described in a JSON file."""
    job = ForwardJob(**json.loads(description.read_text()))
    with torch.no_grad():
        results = {name: tensor.contiguous() for name, tensor in states(_open(job), job)}
    save_file(results, job.output)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

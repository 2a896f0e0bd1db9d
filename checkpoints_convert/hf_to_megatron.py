"""``import``: a Hugging Face Llama becomes a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from checkpoints_convert import companions
from checkpoints_convert.layouts import MegatronShape, padded_vocab_size
from checkpoints_convert.param_map import Entry
from checkpoints_convert.progress import Progress
from checkpoints_convert.source import HuggingFaceSource
from checkpoints_convert.torch_dist_writer import write_torch_dist
from megatron_dmc.checkpoint.locate import HUGGING_FACE, RELEASE, TRACKER, locate
from megatron_dmc.checkpoint.manifest import write_manifest
from megatron_dmc.checkpoint.settings import dmc_arguments, megatron_arguments
from megatron_dmc.config import DMCConfig
from megatron_dmc.files import new_directory, write_text


def import_checkpoint(source: Path | str, destination: Path | str, *, overwrite: bool = False) -> Path:
    """Convert a Hugging Face directory to a Megatron ``torch_dist`` checkpoint.

    Args:
        source: as ``save_pretrained`` writes it: ``config.json``, safetensors (sharded or not), tokenizer or none.
        destination: what Megatron's ``--load`` or ``--pretrained-checkpoint`` gets.

    Returns:
        ``destination``.

    Raises:
        ValueError: an unsupported or damaged model, or a destination that exists.
    """
    location = locate(source)
    if location.format != HUGGING_FACE:
        raise ValueError(f"{source} is a Megatron checkpoint already: import takes a Hugging Face directory")
    model = HuggingFaceSource(location.directory)
    destination = Path(destination)
    shape = MegatronShape(model.llama, padded_vocab_size(model.llama.vocab_size))
    arguments = saved_arguments(shape, model.dmc)
    with new_directory(destination, overwrite=overwrite) as partial:
        progress = Progress("import", _bytes(model))

        def read(entry: Entry) -> torch.Tensor:
            return entry.mapping.layout.fuse(model.parts(entry), shape)

        weights = partial / RELEASE
        hashes = write_torch_dist(weights, shape, arguments, read, progress)
        companions.copy_companions(model.directory, weights / companions.FOLDER)
        write_manifest(weights, hashes)
        write_text(partial / TRACKER, RELEASE)
        progress.finish()
    return destination


def saved_arguments(shape: MegatronShape, dmc: DMCConfig | None, tensor_size: int = 1, pipeline_size: int = 1) -> Any:
    """Megatron's saved arguments for a converted model, in plain types."""
    arguments = megatron_arguments(shape.llama) | {
        "params_dtype": getattr(torch, shape.llama.dtype),
        "padded_vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": 128,
        "seq_length": shape.llama.max_position_embeddings,
        "tensor_model_parallel_size": tensor_size,
        "pipeline_model_parallel_size": pipeline_size,
        "ckpt_format": "torch_dist",
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return arguments if dmc is None else arguments | dmc_arguments(dmc)


def _bytes(model: HuggingFaceSource) -> int:
    return sum(tensor.nbytes for tensor in model.files.tensors.values())

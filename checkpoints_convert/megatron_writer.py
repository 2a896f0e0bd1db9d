"""Any model source, written as a Megatron checkpoint in one of the two formats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_convert.legacy_writer import TRANSFORMER_ENGINE, LegacyCut, write_legacy
from checkpoints_convert.options import Options
from checkpoints_convert.sizes import megatron_bytes
from checkpoints_convert.torch_dist_writer import write_torch_dist
from megatron_dmc.checkpoint import companions
from megatron_dmc.checkpoint.locate import LEGACY, RELEASE, TORCH_DIST, TRACKER
from megatron_dmc.checkpoint.manifest import write_manifest
from megatron_dmc.checkpoint.saved_arguments import dmc_arguments
from megatron_dmc.checkpoint.source import Source
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import VOCAB_MULTIPLE, MegatronShape, padded_vocab_size
from megatron_dmc.models.hugging_face import to_hf_config
from megatron_dmc.models.megatron import megatron_arguments
from megatron_dmc.models.tensors import Entry
from megatron_dmc.support.files import new_directory, write_text
from megatron_dmc.support.progress import progress


@dataclass(frozen=True)
class MegatronLayout:
    """Format of a Megatron checkpoint; the sizes count for the legacy format, ``torch_dist`` is read under any.

    ``layers_per_virtual_stage`` is Megatron's --num-layers-per-virtual-pipeline-stage.
    """

    format: str = TORCH_DIST
    tensor_size: int = 1
    pipeline_size: int = 1
    layers_per_virtual_stage: int | None = None
    transformer_impl: str = TRANSFORMER_ENGINE

    def check(self, config: ModelConfig) -> None:
        """Raises ``ValueError`` where the model cannot be cut this way; the message says what divides."""
        if self.format not in (TORCH_DIST, LEGACY):
            raise ValueError(f"format {self.format!r}: must be {TORCH_DIST} or {LEGACY}")
        if self.format == TORCH_DIST and self != ANY_LAYOUT:
            raise ValueError(
                f"a {TORCH_DIST} checkpoint is read under any layout: give no parallel sizes, or --format {LEGACY}"
            )
        if min(self.tensor_size, self.pipeline_size) < 1:
            raise ValueError("parallel sizes must be at least 1")
        for name in ("num_kv_heads", "ffn_hidden_size"):
            size = getattr(config, name)
            if size % self.tensor_size:
                raise ValueError(f"--tensor-model-parallel-size {self.tensor_size} does not divide {name}={size}")
        layers, per_stage = config.num_layers, self.layers_per_virtual_stage
        if layers % self.pipeline_size:
            raise ValueError(f"--pipeline-model-parallel-size {self.pipeline_size} does not divide {layers} layers")
        if per_stage is not None and (
            self.pipeline_size == 1 or per_stage < 1 or layers // self.pipeline_size % per_stage
        ):
            raise ValueError(
                f"--num-layers-per-virtual-pipeline-stage {per_stage}: must divide the {layers // self.pipeline_size} "
                "layers of a pipeline rank, of which there must be at least 2"
            )

    def chunks(self, num_layers: int) -> list[list[range]]:
        """Layers of every model chunk: ``[pipeline rank][virtual stage]``, in the order that Megatron deals them."""
        per_chunk = self.layers_per_virtual_stage or num_layers // self.pipeline_size
        virtual = num_layers // (per_chunk * self.pipeline_size)
        starts = [
            [(stage * self.pipeline_size + rank) * per_chunk for stage in range(virtual)]
            for rank in range(self.pipeline_size)
        ]
        return [[range(start, start + per_chunk) for start in of_rank] for of_rank in starts]


ANY_LAYOUT = MegatronLayout()


def write_megatron(
    source: Source,
    destination: Path,
    label: str,
    *,
    layout: MegatronLayout,
    options: Options,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write a model as a Megatron ``release`` checkpoint with its companions and a manifest.

    Args:
        check: called (unless the options say not to verify) with the complete directory before it takes its place;
            what it raises leaves nothing behind.

    Raises:
        ValueError: the layout does not fit the model, Megatron cannot express it, or the destination exists.
    """
    layout.check(source.config)
    shape = MegatronShape(source.config, padded_vocab_size(source.config.vocab_size, layout.tensor_size))
    options.check_resources(shape, destination)
    arguments = _saved_arguments(shape, source, layout)

    def read(entry: Entry) -> torch.Tensor:
        return entry.row.layout.fuse(source.parts(entry), shape)

    with new_directory(destination, overwrite=options.overwrite) as partial:
        weights = partial / RELEASE
        hashes: dict[str, str] = {}
        with progress(label, megatron_bytes(shape), "B") as advance:
            if layout.format == TORCH_DIST:
                hashes = write_torch_dist(weights, shape, arguments, read, advance)
            else:
                cut = LegacyCut(layout.tensor_size, layout.chunks(shape.config.num_layers), layout.transformer_impl)
                write_legacy(weights, shape, arguments, read, cut, advance)
        companions.keep_companions(source.companions, weights / companions.FOLDER, to_hf_config(source.config))
        write_manifest(weights, hashes)
        write_text(partial / TRACKER, RELEASE)
        if check is not None and options.verify:
            check(partial)


def _saved_arguments(shape: MegatronShape, source: Source, layout: MegatronLayout) -> dict[str, Any]:
    """Megatron's saved arguments for a converted model."""
    per_stage = layout.layers_per_virtual_stage
    virtual = len(layout.chunks(shape.config.num_layers)[0])
    arguments = megatron_arguments(shape.config) | {
        "params_dtype": getattr(torch, shape.config.dtype),
        "padded_vocab_size": shape.padded_vocab_size,
        "make_vocab_size_divisible_by": VOCAB_MULTIPLE,
        "seq_length": shape.config.max_position_embeddings,
        "tensor_model_parallel_size": layout.tensor_size,
        "pipeline_model_parallel_size": layout.pipeline_size,
        "virtual_pipeline_model_parallel_size": virtual if virtual > 1 else None,
        "num_layers_per_virtual_pipeline_stage": per_stage,
        "ckpt_format": layout.format,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_save_optim": True,
        "no_save_rng": True,
    }
    return arguments if source.dmc is None else arguments | dmc_arguments(source.dmc)

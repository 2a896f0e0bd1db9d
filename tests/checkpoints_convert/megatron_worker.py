"""One rank of Megatron on the CPU: loads checkpoints as ``pretrain`` does and writes the logits of the last stage.

Run as ``python -m tests.checkpoints_convert.megatron_worker JOBS.json`` with RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT set. ``JOBS.json``: ``{"tensor": T, "pipeline": P, "jobs": [{"checkpoint", "tokens", "logits"}, ...]}``.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.checkpoint.locate import TORCH_DIST, locate
from megatron_dmc.checkpoint.saved_arguments import read_saved_arguments
from megatron_dmc.models.megatron import gpt_keywords, transformer_keywords
from megatron_dmc.seam import host


def build_model(config: Any, padded_vocab_size: int, pipeline_rank: int = 0, pipeline_size: int = 1) -> Any:
    """Megatron's own GPTModel for the arguments that a checkpoint states."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from checkpoints_convert.forward_megatron import WITHOUT_EXTENSIONS

    dtype = getattr(torch, config.dtype)
    transformer = TransformerConfig(
        **transformer_keywords(config),
        **WITHOUT_EXTENSIONS,
        tensor_model_parallel_size=_size("tensor"),
        pipeline_model_parallel_size=pipeline_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
    )
    return GPTModel(
        config=transformer,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_norm),
        vocab_size=padded_vocab_size,
        pre_process=pipeline_rank == 0,
        post_process=pipeline_rank == pipeline_size - 1,
        parallel_output=False,
        **gpt_keywords(config),
    )


def load_weights(model: Any, path: Path) -> None:
    """Load as Megatron's ``load_checkpoint`` does, and require that the keys are exactly the model's."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint import FileSystemReader

    location = locate(path)
    if location.format != TORCH_DIST:
        tensor, pipeline = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_pipeline_model_parallel_rank(),
        )
        name = f"mp_rank_{tensor:02d}" + (f"_{pipeline:03d}" if _size("pipeline") > 1 else "")
        state = torch.load(location.directory / name / "model_optim_rng.pt", weights_only=False)
        model.load_state_dict(state["model"], strict=True)
        return
    common = dist_checkpointing.load_common_state_dict(location.directory)
    metadata = dict(common["content_metadata"])
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for cache_metadata in (True, False):
        wanted = {"model": model.sharded_state_dict(metadata=metadata)}
        loaded = dist_checkpointing.load(
            wanted, str(location.directory), TorchDistLoadShardedStrategy(cache_metadata=cache_metadata)
        )
        model.load_state_dict(loaded["model"], strict=True)
    if torch.distributed.get_world_size() == 1:
        stored = set(FileSystemReader(location.directory).read_metadata().state_dict_metadata)
        asked = {
            getattr(value, "unique_key", None) or value.key
            for value in model.sharded_state_dict(metadata=metadata).values()
        }
        assert stored - {"common_state/shard_0_1"} == asked, stored ^ asked


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits ``[B, S, V]`` on the last pipeline rank, None on the others."""
    from megatron.core import parallel_state

    rank, size = parallel_state.get_pipeline_model_parallel_rank(), _size("pipeline")
    batch, length = tokens.shape
    if rank > 0:
        hidden = torch.empty((length, batch, model.config.hidden_size), dtype=model.config.params_dtype)
        torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    output = model(tokens, positions, mask)
    if rank < size - 1:
        torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return output


def main() -> None:
    work = json.loads(Path(sys.argv[1]).read_text())
    host.use_cpu()
    from megatron.core import parallel_state, tensor_parallel

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(work["tensor"], work["pipeline"])
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for job in work["jobs"]:
        settings = read_saved_arguments(job["checkpoint"])
        rank = parallel_state.get_pipeline_model_parallel_rank()
        # Float32 whatever is stored: Megatron casts when it loads, and rounding does not hide a wrong layout.
        config = dataclasses.replace(settings.config, dtype="float32")
        model = build_model(config, settings.args["padded_vocab_size"], rank, work["pipeline"]).eval()
        load_weights(model, Path(job["checkpoint"]))
        with torch.no_grad():
            logits = logits_of(model, torch.tensor(job["tokens"]))
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(logits[..., : config.vocab_size], job["logits"])
    torch.distributed.destroy_process_group()


def _size(axis: str) -> int:
    from megatron.core import parallel_state

    if axis == "tensor":
        return parallel_state.get_tensor_model_parallel_world_size()
    return parallel_state.get_pipeline_model_parallel_world_size()


if __name__ == "__main__":
    main()

"""Writes the stored checkpoints: run on four ranks with the Megatron core whose files are wanted, on a CPU.

``python -m tests.checkpoints_convert.written_by_core.write DIRECTORY`` with RANK, WORLD_SIZE=4, MASTER_ADDR and
MASTER_PORT set. Weights are put in place by hand here, not by the converter that the files test.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from tests.checkpoints_convert.written_by_core.known_weights import (
    FFN_HIDDEN_SIZE,
    HEAD_DIM,
    HIDDEN_SIZE,
    MAX_POSITIONS,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    PADDED_VOCAB_SIZE,
    VOCAB_SIZE,
    known_weights,
)

TENSOR, PIPELINE = 2, 2
ITERATION = 5


def main(directory: Path) -> None:
    """Save one checkpoint."""
    # Core asks for CUDA's current device and waits for it, whatever it computes on.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.distributed.init_process_group("gloo")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    parallel_state.initialize_model_parallel(TENSOR, PIPELINE)
    tensor = parallel_state.get_tensor_model_parallel_rank()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    model = _build(parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_shard(name, known_weights(), tensor, pipeline))
    state = {
        "args": _arguments(),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "model": model.sharded_state_dict(),
        "num_floating_point_operations_so_far": 0,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 40},
        "rng_state": ShardedObject(
            "rng_state", [{"torch_rng_state": torch.zeros(8)}], (PIPELINE, TENSOR), (pipeline, tensor)
        ),
    }
    target = directory / f"iter_{ITERATION:07d}"
    if torch.distributed.get_rank() == 0:
        target.mkdir(parents=True)
        (directory / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(target))
    torch.distributed.barrier()


def _build(first: bool, last: bool) -> torch.nn.Module:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        num_query_groups=NUM_KV_HEADS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN_HIDDEN_SIZE,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=TENSOR,
        pipeline_model_parallel_size=PIPELINE,
        pipeline_dtype=torch.bfloat16,
        params_dtype=torch.bfloat16,
        bf16=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=PADDED_VOCAB_SIZE,
        max_sequence_length=MAX_POSITIONS,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
    )
    return model.bfloat16()


def _shard(name: str, weights: dict[str, Tensor], tensor: int, pipeline: int) -> Tensor:
    """A rank's part of a parameter."""
    if name.startswith("decoder.layers."):
        number, kind = name.removeprefix("decoder.layers.").split(".", 1)
        prefix = f"model.layers.{int(number) + pipeline * NUM_LAYERS // PIPELINE}."
        return _layer_shard(kind, {key.removeprefix(prefix): weight for key, weight in weights.items()}, tensor)
    if name == "decoder.final_layernorm.weight":
        return weights["model.norm.weight"]
    whole = weights["model.embed_tokens.weight" if name.startswith("embedding") else "lm_head.weight"]
    padded = torch.zeros(PADDED_VOCAB_SIZE, HIDDEN_SIZE, dtype=whole.dtype)
    padded[:VOCAB_SIZE] = whole
    return padded.chunk(TENSOR)[tensor]


def _layer_shard(kind: str, layer: dict[str, Tensor], tensor: int) -> Tensor:
    if kind == "self_attention.linear_qkv.weight":
        # Per KV head: its query heads, its key head, its value head. One KV head per rank.
        queries, keys, values = (layer[f"self_attn.{part}_proj.weight"].chunk(TENSOR)[tensor] for part in "qkv")
        return torch.cat([queries, keys, values])
    if kind == "mlp.linear_fc1.weight":
        return torch.cat([layer[f"mlp.{part}_proj.weight"].chunk(TENSOR)[tensor] for part in ("gate", "up")])
    by_columns = {"self_attention.linear_proj.weight": "self_attn.o_proj", "mlp.linear_fc2.weight": "mlp.down_proj"}
    if kind in by_columns:
        return layer[by_columns[kind] + ".weight"].chunk(TENSOR, dim=1)[tensor]
    return layer["input_layernorm.weight" if kind.startswith("input") else "post_attention_layernorm.weight"]


def _arguments() -> argparse.Namespace:
    """What Megatron's training of these releases saves, as far as a model follows from it."""
    return argparse.Namespace(
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_HEADS,
        group_query_attention=True,
        num_query_groups=NUM_KV_HEADS,
        kv_channels=HEAD_DIM,
        ffn_hidden_size=FFN_HIDDEN_SIZE,
        vocab_size=VOCAB_SIZE,
        padded_vocab_size=PADDED_VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        norm_epsilon=1e-5,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        add_bias_linear=False,
        add_qkv_bias=False,
        swiglu=True,
        normalization="RMSNorm",
        untie_embeddings_and_output_weights=True,
        tensor_model_parallel_size=TENSOR,
        pipeline_model_parallel_size=PIPELINE,
        bf16=True,
        fp16=False,
        params_dtype=torch.bfloat16,
        iteration=ITERATION,
        consumed_train_samples=40,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))

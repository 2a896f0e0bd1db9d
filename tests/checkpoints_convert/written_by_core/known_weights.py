"""The Llama in the stored checkpoints: every weight follows from its name and place, whoever computes it."""

from __future__ import annotations

import zlib

import torch

NUM_LAYERS = 4
HIDDEN_SIZE = 16
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 8
FFN_HIDDEN_SIZE = 24
VOCAB_SIZE = 60
PADDED_VOCAB_SIZE = 64
MAX_POSITIONS = 64


def known_weight(name: str, rows: int, columns: int | None = None) -> torch.Tensor:
    """Numbers in [-1, 1) that bfloat16 holds exactly, from the Hugging Face name of a weight."""
    count = rows * (columns or 1)
    mixed = (torch.arange(count) * 40503 + zlib.crc32(name.encode())) % 65521
    weight = ((mixed * 40503 % 65537 % 256) / 128 - 1).to(torch.bfloat16)
    return weight if columns is None else weight.view(rows, columns)


def known_weights() -> dict[str, torch.Tensor]:
    """All of them, under Hugging Face names."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            prefix + "input_layernorm.weight": (HIDDEN_SIZE,),
            prefix + "self_attn.q_proj.weight": (NUM_HEADS * HEAD_DIM, HIDDEN_SIZE),
            prefix + "self_attn.k_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            prefix + "self_attn.v_proj.weight": (NUM_KV_HEADS * HEAD_DIM, HIDDEN_SIZE),
            prefix + "self_attn.o_proj.weight": (HIDDEN_SIZE, NUM_HEADS * HEAD_DIM),
            prefix + "post_attention_layernorm.weight": (HIDDEN_SIZE,),
            prefix + "mlp.gate_proj.weight": (FFN_HIDDEN_SIZE, HIDDEN_SIZE),
            prefix + "mlp.up_proj.weight": (FFN_HIDDEN_SIZE, HIDDEN_SIZE),
            prefix + "mlp.down_proj.weight": (HIDDEN_SIZE, FFN_HIDDEN_SIZE),
        }
    shapes |= {"model.norm.weight": (HIDDEN_SIZE,), "lm_head.weight": (VOCAB_SIZE, HIDDEN_SIZE)}
    return {name: known_weight(name, *shape) for name, shape in shapes.items()}

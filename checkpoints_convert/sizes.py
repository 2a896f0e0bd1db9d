"""What a conversion will take: bytes on the disk and in memory, from the shape of the model alone."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from checkpoints_convert.streams import WRITER_THREADS
from megatron_dmc.models.config import LlamaConfig
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.tensors import EMBEDDING_ROW, Entry, entries

# Anonymous memory of a process that has imported torch; with transformers or Megatron in it as well. Measured:
# examples/benchmarks/convert.md.
PROCESS_BYTES = 500_000_000
FORWARD_PROCESS_BYTES = 1_000_000_000


class ForwardBytes(NamedTuple):
    """Memory of a forward pass that walks the layers one by one: for the layers alone, and with the logits."""

    layers: int
    whole: int


def itemsize(llama: LlamaConfig) -> int:
    """Bytes of an element."""
    return getattr(torch, llama.dtype).itemsize


def entry_bytes(entry: Entry, llama: LlamaConfig) -> int:
    """Bytes of the Hugging Face tensors of an entry."""
    return _hf_elements(entry, llama) * itemsize(llama)


def weight_bytes(llama: LlamaConfig) -> int:
    """Bytes of a model's weights in the type they are stored in, without padding."""
    return sum(_hf_elements(entry, llama) for entry in entries(llama)) * itemsize(llama)


def megatron_bytes(shape: MegatronShape) -> int:
    """The same with the padded vocabulary of Megatron."""
    elements = sum(math.prod(entry.megatron_shape(shape)) for entry in entries(shape.llama))
    return elements * itemsize(shape.llama)


def largest_layer_bytes(llama: LlamaConfig) -> int:
    """Bytes of a transformer layer, or of the embedding where that is larger."""
    in_layer = sum(_hf_elements(entry, llama) for entry in entries(llama) if entry.layer == 0)
    outside = max(_hf_elements(entry, llama) for entry in entries(llama) if entry.layer is None)
    return max(in_layer, outside) * itemsize(llama)


def conversion_bytes(shape: MegatronShape) -> int:
    """Peak anonymous memory: in every thread the largest tensor of Megatron beside the tensors it is made of."""
    largest = max(math.prod(entry.megatron_shape(shape)) for entry in entries(shape.llama))
    return PROCESS_BYTES + WRITER_THREADS * 2 * largest * itemsize(shape.llama)


def forward_bytes(llama: LlamaConfig) -> ForwardBytes:
    """Peak anonymous memory of a forward pass in float32, one layer in memory at a time."""
    in_layer = [_hf_elements(entry, llama) for entry in entries(llama) if entry.layer == 0]
    layers = FORWARD_PROCESS_BYTES + 4 * sum(in_layer) + (4 + itemsize(llama)) * max(in_layer)
    output = next(_hf_elements(entry, llama) for entry in entries(llama) if entry.mapping.megatron == EMBEDDING_ROW)
    return ForwardBytes(layers, max(layers, FORWARD_PROCESS_BYTES + 2 * output * itemsize(llama)))


def _hf_elements(entry: Entry, llama: LlamaConfig) -> int:
    return sum(math.prod(shape) for shape in entry.hf_shapes(llama))

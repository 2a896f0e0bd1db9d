"""What a conversion will take: bytes on the disk and in memory, from the shape of the model alone."""

from __future__ import annotations

import math
from typing import NamedTuple

from checkpoints_convert.streams import WRITER_THREADS
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import MegatronShape
from megatron_dmc.models.tensors import EMBEDDING, Entry, entries
from megatron_dmc.support.element_types import ELEMENT_TYPES

# Anonymous memory of a process that has imported torch; with transformers or Megatron in it as well. Measured:
# examples/benchmarks/results/convert.md.
PROCESS_BYTES = 500_000_000
FORWARD_PROCESS_BYTES = 1_000_000_000


class ForwardBytes(NamedTuple):
    """Memory of a forward pass that walks the layers one by one: for the layers alone, and with the logits."""

    layers: int
    whole: int


def itemsize(config: ModelConfig) -> int:
    """Bytes of an element."""
    return ELEMENT_TYPES[config.dtype].itemsize


def entry_bytes(entry: Entry, config: ModelConfig) -> int:
    """Bytes of the Hugging Face tensors of an entry."""
    return _hf_elements(entry, config) * itemsize(config)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of a model's weights in the type they are stored in, without padding."""
    return sum(_hf_elements(entry, config) for entry in entries(config)) * itemsize(config)


def megatron_bytes(shape: MegatronShape) -> int:
    """The same with the padded vocabulary of Megatron."""
    elements = sum(math.prod(entry.megatron_shape(shape)) for entry in entries(shape.config))
    return elements * itemsize(shape.config)


def largest_layer_bytes(config: ModelConfig) -> int:
    """Bytes of a transformer layer, or of the embedding where that is larger."""
    in_layer = sum(_hf_elements(entry, config) for entry in entries(config) if entry.layer == 0)
    outside = max(_hf_elements(entry, config) for entry in entries(config) if entry.layer is None)
    return max(in_layer, outside) * itemsize(config)


def conversion_bytes(shape: MegatronShape) -> int:
    """Peak anonymous memory: in every thread the largest tensor of Megatron beside the tensors it is made of."""
    largest = max(math.prod(entry.megatron_shape(shape)) for entry in entries(shape.config))
    return PROCESS_BYTES + WRITER_THREADS * 2 * largest * itemsize(shape.config)


def forward_bytes(config: ModelConfig) -> ForwardBytes:
    """Peak anonymous memory of a forward pass in float32, one layer in memory at a time."""
    in_layer = [_hf_elements(entry, config) for entry in entries(config) if entry.layer == 0]
    layers = FORWARD_PROCESS_BYTES + 4 * sum(in_layer) + (4 + itemsize(config)) * max(in_layer)
    output = next(_hf_elements(entry, config) for entry in entries(config) if entry.row.megatron == EMBEDDING)
    return ForwardBytes(layers, max(layers, FORWARD_PROCESS_BYTES + 2 * output * itemsize(config)))


def _hf_elements(entry: Entry, config: ModelConfig) -> int:
    return sum(math.prod(shape) for shape in entry.hf_shapes(config))

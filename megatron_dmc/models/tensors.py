"""The one table of tensor names: Megatron's on the left, Hugging Face's on the right, both directions derived.

``*`` is the layer. Shapes use h hidden_size, q query heads x head_dim, kv KV heads x head_dim, f ffn_hidden_size,
v vocab_size; Megatron stacks the layers of ``torch_dist`` on a new first axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_dmc.models import fusion
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.fusion import Layout, MegatronShape


@dataclass(frozen=True)
class Mapping:
    """One tensor of Megatron and the tensors of Hugging Face, with their shapes, that it is made of."""

    megatron: str
    layout: Layout
    hugging_face: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "*" in self.megatron


TABLE = (
    Mapping("embedding.word_embeddings.weight", fusion.VOCABULARY, (("model.embed_tokens.weight", ("v", "h")),)),
    Mapping(
        "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight",
        fusion.REPLICATED,
        (("model.layers.*.input_layernorm.weight", ("h",)),),
    ),
    Mapping(
        "decoder.layers.*.self_attention.linear_qkv.weight",
        fusion.QKV,
        (
            ("model.layers.*.self_attn.q_proj.weight", ("q", "h")),
            ("model.layers.*.self_attn.k_proj.weight", ("kv", "h")),
            ("model.layers.*.self_attn.v_proj.weight", ("kv", "h")),
        ),
    ),
    Mapping(
        "decoder.layers.*.self_attention.linear_proj.weight",
        fusion.COLUMNS,
        (("model.layers.*.self_attn.o_proj.weight", ("h", "q")),),
    ),
    Mapping(
        "decoder.layers.*.mlp.linear_fc1.layer_norm_weight",
        fusion.REPLICATED,
        (("model.layers.*.post_attention_layernorm.weight", ("h",)),),
    ),
    Mapping(
        "decoder.layers.*.mlp.linear_fc1.weight",
        fusion.GATE_UP,
        (
            ("model.layers.*.mlp.gate_proj.weight", ("f", "h")),
            ("model.layers.*.mlp.up_proj.weight", ("f", "h")),
        ),
    ),
    Mapping(
        "decoder.layers.*.mlp.linear_fc2.weight",
        fusion.COLUMNS,
        (("model.layers.*.mlp.down_proj.weight", ("h", "f")),),
    ),
    Mapping("decoder.final_layernorm.weight", fusion.REPLICATED, (("model.norm.weight", ("h",)),)),
    Mapping("output_layer.weight", fusion.VOCABULARY, (("lm_head.weight", ("v", "h")),)),
)
LM_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
OUTPUT_LAYER = "output_layer.weight"
EMBEDDING_ROW = "embedding.word_embeddings.weight"

# Modules of Megatron that keep an (empty) state of low-precision training beside each layer's weights.
EXTRA_STATE_MODULES = (
    "decoder.layers.*.self_attention.linear_qkv",
    "decoder.layers.*.self_attention.linear_proj",
    "decoder.layers.*.mlp.linear_fc1",
    "decoder.layers.*.mlp.linear_fc2",
)

# Buffers that old transformers saved; they follow from config.json.
IGNORED_SUFFIX = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: a row of the table for one layer (None: outside the layers)."""

    mapping: Mapping
    layer: int | None

    @property
    def megatron_name(self) -> str:
        """Its name in the legacy layout."""
        return _numbered(self.mapping.megatron, self.layer)

    @property
    def stacked_name(self) -> str:
        """Its name in ``torch_dist``, where the layers are stacked."""
        return self.mapping.megatron.replace(".*", "")

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The Hugging Face tensors that it is made of."""
        return tuple(_numbered(name, self.layer) for name, _ in self.mapping.hugging_face)

    def hf_shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """The shapes of those."""
        sizes = _sizes(config)
        return tuple(tuple(sizes[letter] for letter in letters) for _, letters in self.mapping.hugging_face)

    def megatron_shape(self, shape: MegatronShape) -> tuple[int, ...]:
        """Its shape in Megatron, over all tensor ranks."""
        if self.mapping.layout is fusion.VOCABULARY:
            return (shape.padded_vocab_size, shape.config.hidden_size)
        shapes = self.hf_shapes(shape.config)
        return (sum(part[0] for part in shapes), *shapes[0][1:])


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order of its forward pass."""
    rows = [row for row in TABLE if not (config.tie_word_embeddings and row.megatron == OUTPUT_LAYER)]
    first_layer_row = next(index for index, row in enumerate(rows) if row.per_layer)
    before, after = rows[:first_layer_row], [row for row in rows[first_layer_row:] if not row.per_layer]
    layer_rows = [row for row in rows if row.per_layer]
    in_layers = [Entry(row, layer) for layer in range(config.num_layers) for row in layer_rows]
    return [Entry(row, None) for row in before] + in_layers + [Entry(row, None) for row in after]


@functools.lru_cache(maxsize=8)
def by_hf_name(config: ModelConfig) -> dict[str, tuple[Entry, int]]:
    """For every Hugging Face name its entry and its place among the entry's tensors."""
    return {name: (entry, place) for entry in entries(config) for place, name in enumerate(entry.hf_names)}


def check_names(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Compare the tensors of a checkpoint with those of its model.

    Raises:
        ValueError: a tensor is missing, or one is there that the model does not use; both are named.
    """
    given, expected = set(given), set(expected)
    missing, unused = sorted(expected - given), sorted(given - expected)
    if missing or unused:
        told = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", unused)) if names]
        raise ValueError(f"{what} does not hold the tensors of its model: it {' and '.join(told)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _numbered(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("*", str(layer))


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "h": config.hidden_size,
        "q": config.num_attention_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "f": config.ffn_hidden_size,
        "v": config.vocab_size,
    }

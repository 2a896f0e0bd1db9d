"""The tensors of a model: what Megatron stores each as, and how both sides call them, in either direction.

The rows are those of the block that all families share; a family's table (``families``) gives its names in Hugging
Face's files. ``*`` is the layer. Shapes use h hidden_size, q query heads x head_dim, kv KV heads x head_dim, g KV
heads, d head_dim, f ffn_hidden_size, v vocab_size; Megatron stacks the layers of ``torch_dist`` on a new first axis.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_dmc.models import fusion
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import family_of
from megatron_dmc.models.fusion import Layout, MegatronShape


class Part(NamedTuple):
    """One tensor of Hugging Face: our word for it, which ``Family.tensor_name`` takes, and its shape in letters."""

    role: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One tensor of Megatron and what it is made of. ``flag``: field of ModelConfig that says whether it exists."""

    megatron: str
    layout: Layout
    parts: tuple[Part, ...]
    flag: str | None = None

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "*" in self.megatron


# Megatron's names; a tied model has no output layer.
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_ATTENTION = "decoder.layers.*.self_attention"
_MLP = "decoder.layers.*.mlp"

ROWS = (
    Row(EMBEDDING, fusion.VOCABULARY, (Part("embedding", ("v", "h")),)),
    Row(f"{_ATTENTION}.linear_qkv.layer_norm_weight", fusion.REPLICATED, (Part("attention_norm", ("h",)),)),
    Row(
        f"{_ATTENTION}.linear_qkv.weight",
        fusion.QKV,
        (Part("q", ("q", "h")), Part("k", ("kv", "h")), Part("v", ("kv", "h"))),
    ),
    Row(f"{_ATTENTION}.q_layernorm.weight", fusion.REPLICATED, (Part("q_norm", ("d",)),), flag="qk_norm"),
    Row(f"{_ATTENTION}.k_layernorm.weight", fusion.REPLICATED, (Part("k_norm", ("d",)),), flag="qk_norm"),
    Row(f"{_ATTENTION}.decision_norm.weight", fusion.REPLICATED, (Part("decision_norm", ("h",)),), flag="adapter"),
    Row(f"{_ATTENTION}.decision.weight", fusion.ROWS, (Part("decision", ("g", "h")),), flag="adapter"),
    Row(f"{_ATTENTION}.linear_proj.weight", fusion.COLUMNS, (Part("attention_output", ("h", "q")),)),
    Row(f"{_MLP}.linear_fc1.layer_norm_weight", fusion.REPLICATED, (Part("mlp_norm", ("h",)),)),
    Row(f"{_MLP}.linear_fc1.weight", fusion.GATE_UP, (Part("gate", ("f", "h")), Part("up", ("f", "h")))),
    Row(f"{_MLP}.linear_fc2.weight", fusion.COLUMNS, (Part("down", ("h", "f")),)),
    Row(FINAL_NORM, fusion.REPLICATED, (Part("final_norm", ("h",)),)),
    Row(OUTPUT_LAYER, fusion.VOCABULARY, (Part("output", ("v", "h")),)),
)

# Norms of Megatron's local specification, under the names of Transformer Engine's and of torch_dist.
LOCAL_SPEC_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}

# Modules of Megatron that keep an (empty) state of low-precision training beside each layer's weights.
EXTRA_STATE_MODULES = (
    f"{_ATTENTION}.linear_qkv",
    f"{_ATTENTION}.linear_proj",
    f"{_MLP}.linear_fc1",
    f"{_MLP}.linear_fc2",
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a model: a row for one layer (None: outside the layers), and the Hugging Face tensors it holds."""

    row: Row
    layer: int | None
    hf_names: tuple[str, ...]

    @property
    def megatron_name(self) -> str:
        """Its name in the legacy layout."""
        return _numbered(self.row.megatron, self.layer)

    @property
    def stacked_name(self) -> str:
        """Its name in ``torch_dist``, where the layers are stacked."""
        return self.row.megatron.replace(".*", "")

    def hf_shapes(self, config: ModelConfig) -> tuple[tuple[int, ...], ...]:
        """The shapes of its Hugging Face tensors."""
        sizes = _sizes(config)
        return tuple(tuple(sizes[letter] for letter in part.shape) for part in self.row.parts)

    def megatron_shape(self, shape: MegatronShape) -> tuple[int, ...]:
        """Its shape in Megatron, over all tensor ranks."""
        if self.row.layout is fusion.VOCABULARY:
            return (shape.padded_vocab_size, shape.config.hidden_size)
        shapes = self.hf_shapes(shape.config)
        return (sum(part[0] for part in shapes), *shapes[0][1:])


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order of its forward pass."""
    rows = [row for row in ROWS if row.flag is None or getattr(config, row.flag)]
    if config.tie_word_embeddings:
        rows = [row for row in rows if row.megatron != OUTPUT_LAYER]
    family = family_of(config.family)

    def entry(row: Row, layer: int | None) -> Entry:
        return Entry(row, layer, tuple(_numbered(family.tensor_name(part.role), layer) for part in row.parts))

    first_layer_row = next(index for index, row in enumerate(rows) if row.per_layer)
    before, after = rows[:first_layer_row], [row for row in rows[first_layer_row:] if not row.per_layer]
    layer_rows = [row for row in rows if row.per_layer]
    in_layers = [entry(row, layer) for layer in range(config.num_layers) for row in layer_rows]
    return [entry(row, None) for row in before] + in_layers + [entry(row, None) for row in after]


@functools.lru_cache(maxsize=8)
def by_hf_name(config: ModelConfig) -> dict[str, tuple[Entry, int]]:
    """For every Hugging Face name its entry and its place among the entry's tensors."""
    return {name: (entry, place) for entry in entries(config) for place, name in enumerate(entry.hf_names)}


def hf_name(config: ModelConfig, role: str, layer: int | None = None) -> str:
    """Hugging Face's name of a tensor, by our word for it and its layer."""
    return _numbered(family_of(config.family).tensor_name(role), layer)


def check_names(given: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Compare the tensors of a checkpoint with those of its model.

    Raises:
        ValueError: a tensor is missing, or one is there that the model does not use; both are named.
    """
    given, expected = set(given), set(expected)
    missing, unused = sorted(expected - given), sorted(given - expected)
    if missing or unused:
        lines = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", unused)) if names]
        raise ValueError(f"{what} does not hold the tensors of its model: it {' and '.join(lines)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _numbered(name: str, layer: int | None) -> str:
    return name if layer is None else name.replace("*", str(layer))


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {
        "h": config.hidden_size,
        "q": config.num_attention_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "g": config.num_kv_heads,
        "d": config.head_dim,
        "f": config.ffn_hidden_size,
        "v": config.vocab_size,
    }

"""Model families: one table each, of what differs from family to family in the shared block of a Llama.

Everything else follows from the table: which ``config.json`` is read and written, how tensors are called on either
side, what is passed to Megatron, and how the decoder computes. A new family is a :class:`Family` in ``FAMILIES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

DMC_PREFIX = "dmc_"
"""Of the model type of compressed models."""

ADAPTER_NAMES = {"decision_norm": "dms_proj_alpha_norm.weight", "decision": "dms_proj_alpha.weight"}
"""Tensors of an adapter, as the code of DMS calls them: they lie beside the projection of the queries."""


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        model_type: what ``config.json`` calls it.
        name: the family under which its models go on (``ModelConfig.family``, checkpoints, exports).
        architecture: class of transformers for its models; the other classes of that module share the prefix.
        tensor_names: Hugging Face's name of every tensor, by our word for it (``tensors.Part``); ``*`` is the layer.
            Those of adapters follow (:meth:`tensor_name`).
        qk_norm: queries and keys pass through an RMSNorm of their own before they are rotated.
        stated: settings that ``config.json`` must state, because transformers would fill in others.
        fixed: settings of this family alone that must be absent or have one of these values; the first is written.
    """

    model_type: str
    name: str
    architecture: str
    tensor_names: Mapping[str, str]
    qk_norm: bool = False
    stated: tuple[str, ...] = ()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def tensor_name(self, role: str) -> str:
        """Hugging Face's name of a tensor."""
        if role in ADAPTER_NAMES:
            beside, _, _ = self.tensor_names["q"].removesuffix(".weight").rpartition(".")
            return f"{beside}.{ADAPTER_NAMES[role]}"
        return self.tensor_names[role]

    @property
    def dmc_model_type(self) -> str:
        """What ``config.json`` of a compressed model calls it."""
        return DMC_PREFIX + self.model_type

    @property
    def dmc_architecture(self) -> str:
        """Class of transformers for compressed models."""
        return "DMC" + self.architecture


LLAMA = Family(
    model_type="llama",
    name="llama",
    architecture="LlamaForCausalLM",
    tensor_names={
        "embedding": "model.embed_tokens.weight",
        "attention_norm": "model.layers.*.input_layernorm.weight",
        "q": "model.layers.*.self_attn.q_proj.weight",
        "k": "model.layers.*.self_attn.k_proj.weight",
        "v": "model.layers.*.self_attn.v_proj.weight",
        "attention_output": "model.layers.*.self_attn.o_proj.weight",
        "mlp_norm": "model.layers.*.post_attention_layernorm.weight",
        "gate": "model.layers.*.mlp.gate_proj.weight",
        "up": "model.layers.*.mlp.up_proj.weight",
        "down": "model.layers.*.mlp.down_proj.weight",
        "final_norm": "model.norm.weight",
        "output": "lm_head.weight",
    },
)

# A Mistral without sliding windows is a Llama and goes on as one.
MISTRAL = dataclasses.replace(LLAMA, model_type="mistral", stated=("num_key_value_heads", "sliding_window"))

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL)}
"""By model type."""


def model_types() -> list[str]:
    """Every ``model_type`` that is read: of plain models, and of compressed ones."""
    return [*FAMILIES, *dict.fromkeys(DMC_PREFIX + family.name for family in FAMILIES.values())]


def family_of(model_type: object) -> Family:
    """The family of a model type, of a plain or a compressed model, or of ``ModelConfig.family``.

    Raises:
        ValueError: there is no such family; the message names those that exist.
    """
    found = FAMILIES.get(str(model_type).removeprefix(DMC_PREFIX))
    if found is None:
        raise ValueError(f"model_type={model_type!r}: must be one of {', '.join(model_types())}")
    return found

"""The ``README.md`` of an exported model."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dmc.config import ADAPTER, DMC, DMS, DMCConfig
from megatron_dmc.models.borrowed_channel import borrowed_by
from megatron_dmc.models.config import ModelConfig
from megatron_dmc.models.families import family_of
from megatron_dmc.ops.borrowed import EVERY_HEAD, FIRST_QUERY, NO_HEAD

_METHODS = {
    DMC: ("Dynamic Memory Compression", "2403.09636"),
    DMS: ("Dynamic Memory Sparsification", "2506.05345"),
}
"""Name and paper."""
_BORROWED = {
    EVERY_HEAD: "the last channel of every query and key head",
    FIRST_QUERY: "the last channel of the first query head of each KV head",
    NO_HEAD: "an adapter in every layer",
}
"""What carries the decisions."""


@dataclass(frozen=True)
class CardFacts:
    """What the card tells besides the model itself.

    Attributes:
        trained: DMC settings of the checkpoint it came from, also where the exported model carries none.
        iteration: of that checkpoint.
        measured_cr: compression ratio that an evaluation measured.
    """

    trained: DMCConfig | None = None
    iteration: int = 0
    measured_cr: float | None = None


def model_card(name: str, config: ModelConfig, dmc: DMCConfig | None, facts: CardFacts) -> str:
    """Text of the card, in Markdown with the front matter that model hubs read."""
    tags = [config.family, "megatron"]
    tags += [_METHODS[dmc.method][0].lower().replace(" ", "-"), "kv-cache-compression"] if dmc else []
    front = "\n".join(["---", "library_name: transformers", "tags:", *(f"- {tag}" for tag in tags), "---"])
    paragraphs = _plain(config, facts) if dmc is None else _compressed(config, dmc, facts)
    return "\n\n".join([front, f"# {name}", _shape(config), *paragraphs]) + "\n"


def _shape(config: ModelConfig) -> str:
    rows = {
        "layers": config.num_layers,
        "hidden size": config.hidden_size,
        "query heads / KV heads": f"{config.num_attention_heads} / {config.num_kv_heads}",
        "head dimension": config.head_dim,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "stored as": config.dtype,
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _plain(config: ModelConfig, facts: CardFacts) -> list[str]:
    trained = facts.trained
    if trained is None or not trained.retrofits:
        return [f"A {config.family} model, exported from a Megatron-LM checkpoint."]
    carrier = _BORROWED[borrowed_by(trained)]
    return [
        f"A {config.family} model, exported from stage `{trained.stage}` of a retrofit with "
        f"{_METHODS[trained.method][0]} (iteration {facts.iteration}). {carrier[0].upper()}{carrier[1:]} is "
        f"{'left out' if trained.decision_source == ADAPTER else 'zero'}; nothing is compressed."
    ]


def _compressed(config: ModelConfig, dmc: DMCConfig, facts: CardFacts) -> list[str]:
    measured = (
        f"Measured compression ratio of the key-value cache: **{facts.measured_cr:.2f}**."
        if facts.measured_cr is not None
        else "The compression ratio of this model has not been measured yet (`megatron-dmc evaluate`)."
    )
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in dmc.to_dict().items() if value is not None)
    name, paper = _METHODS[dmc.method]
    return [
        f"A {config.family} model retrofitted with {name} (arXiv {paper}): each KV head decides for every token "
        f"{_decides(dmc)}.",
        f"{measured} Target of the training: {dmc.target_cr:g} (stage `{dmc.stage}`, iteration {facts.iteration}).",
        "The length of the cache differs from head to head. Engines that keep one length per request (vLLM, "
        "TensorRT-LLM, llama.cpp and others) cannot serve this model; neither can a stock class of "
        f"transformers, because {_BORROWED[borrowed_by(dmc)]} decides. `megatron-dmc "
        f"generate` can, and the class `{family_of(config.family).dmc_architecture}` of `megatron_dmc.hf`.",
        f"| setting | value |\n|---|---|\n{settings}",
    ]


def _decides(dmc: DMCConfig) -> str:
    if dmc.method == DMS:
        return f"whether it is evicted from its key-value cache once {dmc.window_size} more have come"
    return "whether to append to its key-value cache or to merge into the newest entry"

"""``export``: a Megatron checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from torch import Tensor

from checkpoints_convert.hf_writer import write_hugging_face
from checkpoints_convert.model_card import CardFacts
from checkpoints_convert.options import DEFAULTS, Options
from checkpoints_convert.plan import plan_lines
from checkpoints_convert.verify import check_conversion
from megatron_dmc.checkpoint.source import MegatronSource, Source, open_source
from megatron_dmc.models.borrowed_channel import borrowed_by, parts_without_borrowed_channels
from megatron_dmc.models.tensors import Entry


def export_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    tokenizer: Path | str | None = None,
    as_llama: bool = False,
    measured_cr: float | None = None,
    vocab_size: int | None = None,
    options: Options = DEFAULTS,
) -> Path:
    """Convert a Megatron checkpoint to a Hugging Face directory.

    A plain Llama, and a DMC model of stage ``zero_out``, become a ``llama`` that stock transformers loads; stages
    ``retrofit`` and ``consolidate`` become a ``dmc_llama`` with every setting that decoding needs.

    Args:
        source: a ``--save`` directory of Megatron or one iteration in it; ``torch_dist`` of any layout, or legacy.
        destination: a new directory.
        tokenizer: Hugging Face directory or sentencepiece file; default: the files that ``import`` kept.
        as_llama: write plain Llama weights whatever the stage, without borrowed channels and adapters: the retrofitted
            model without compression.
        measured_cr: compression ratio that an evaluation measured, for the model card.
        vocab_size: rows of the vocabulary, for a checkpoint that does not state them.
        options: overwrite, verify, max_memory.

    Returns:
        ``destination``.

    Raises:
        ValueError: an unsupported or damaged checkpoint, no tokenizer at the path, or a destination that exists.
        CheckFailed: the comparison failed or could not be made.
    """
    model = _open(source, vocab_size)
    compresses = model.dmc is not None and model.dmc.compresses and not as_llama
    write_hugging_face(
        model if compresses else PlainLlama(model),
        Path(destination),
        "export",
        facts=CardFacts(model.dmc, model.saved.iteration, measured_cr),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        options=options,
        check=partial(check_conversion, model, max_memory=options.max_memory),
    )
    return Path(destination)


def export_plan(source: Path | str, destination: Path | str, vocab_size: int | None = None) -> list[str]:
    """What :func:`export_checkpoint` would write and take, for people; raises as it would before any work."""
    return plan_lines(_open(source, vocab_size).shape, Path(destination), to_hugging_face=True)


def _open(source: Path | str, vocab_size: int | None) -> MegatronSource:
    model = open_source(source)
    if not isinstance(model, MegatronSource):
        raise ValueError(f"{source} is a Hugging Face directory already: export takes a Megatron checkpoint")
    state_vocabulary(model, vocab_size)
    return model


class PlainLlama(Source):
    """A model without its settings: what produces borrowed channels is zero, and an adapter is left out."""

    def __init__(self, model: Source) -> None:
        self.directory, self.companions, self.dmc = model.directory, model.companions, None
        self.config = dataclasses.replace(model.config, adapter=False)
        self._model = model
        self._borrowed = borrowed_by(model.dmc)

    def parts(self, entry: Entry) -> list[Tensor]:
        return parts_without_borrowed_channels(entry, self._model.parts(entry), self.config, self._borrowed)


def state_vocabulary(model: MegatronSource, vocab_size: int | None) -> None:
    """Make sure that the real rows of the vocabulary are known. Raises ``ValueError`` where they are not."""
    if vocab_size is not None:
        model.set_vocab_size(vocab_size)
    elif not model.states_vocab_size:
        raise ValueError(
            f"{model.directory} does not state its vocabulary (its embedding has {model.shape.padded_vocab_size} rows, "
            "with padding): give --vocab-size, the number of ids of the tokenizer"
        )

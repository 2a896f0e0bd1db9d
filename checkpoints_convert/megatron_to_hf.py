"""``export``: a Megatron checkpoint becomes a Hugging Face directory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from checkpoints_convert import companions
from checkpoints_convert.decision_neurons import clear_borrowed_rows
from checkpoints_convert.hf_writer import write_weights
from checkpoints_convert.model_card import ExportFacts, model_card
from checkpoints_convert.param_map import Entry, entries
from checkpoints_convert.progress import Progress
from checkpoints_convert.source import MegatronSource, open_source
from megatron_dmc.checkpoint.manifest import write_manifest
from megatron_dmc.config import DMCConfig
from megatron_dmc.files import new_directory, write_json, write_text
from megatron_dmc.llama import LlamaConfig, parse_hf_config, to_hf_config


def export_checkpoint(
    source: Path | str,
    destination: Path | str,
    *,
    tokenizer: Path | str | None = None,
    as_llama: bool = False,
    measured_cr: float | None = None,
    vocab_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a Megatron checkpoint to a Hugging Face directory.

    A plain Llama, and a DMC model of stage ``zero_out``, become a ``llama`` that stock transformers loads; stages
    ``retrofit`` and ``consolidate`` become a ``dmc_llama`` with every setting that decoding needs.

    Args:
        source: a ``--save`` directory of Megatron or one iteration in it; ``torch_dist`` of any layout, or legacy.
        destination: a new directory.
        tokenizer: Hugging Face directory or sentencepiece file; default: the files that ``import`` kept.
        as_llama: write plain Llama weights whatever the stage, with the borrowed channels cleared: the retrofitted
            model without compression.
        measured_cr: compression ratio that an evaluation measured, for the model card.
        vocab_size: rows of the vocabulary, for a checkpoint that does not state them.

    Returns:
        ``destination``.

    Raises:
        ValueError: an unsupported or damaged checkpoint, no tokenizer at the path, or a destination that exists.
    """
    model = open_source(source)
    if not isinstance(model, MegatronSource):
        raise ValueError(f"{source} is a Hugging Face directory already: export takes a Megatron checkpoint")
    if vocab_size is not None:
        model.set_vocab_size(vocab_size)
    elif not model.states_vocab_size:
        raise ValueError(
            f"{source} does not state its vocabulary (its embedding has {model.shape.padded_vocab_size} rows, with "
            "padding): give --vocab-size, the number of ids of the tokenizer"
        )
    kept = model.directory / companions.FOLDER
    _check_kept_config(kept, model.llama)
    if tokenizer is None and any(path.name.startswith("tokenizer.") for path in companions.companion_files(kept)):
        tokenizer = kept
    dmc = None if as_llama else _decoding_settings(model.dmc)
    clears = model.dmc is not None and model.dmc.stage != "off" and dmc is None
    with new_directory(Path(destination), overwrite=overwrite) as partial:
        ids = companions.token_ids(kept) | companions.copy_tokenizer(_path(tokenizer), partial)
        write_json(partial / "config.json", to_hf_config(model.llama, dmc, **ids))
        progress = Progress("export", weight_bytes(model.llama))

        def parts(entry: Entry) -> Sequence[Tensor]:
            tensors = model.parts(entry)
            return clear_borrowed_rows(entry, tensors, model.llama) if clears else tensors

        hashes = write_weights(partial, model.llama, parts, progress)
        facts = ExportFacts(Path(destination).name, model.llama, dmc, model.dmc, model.settings.iteration, measured_cr)
        write_text(partial / "README.md", model_card(facts))
        write_manifest(partial, hashes)
        progress.finish()
    return Path(destination)


def weight_bytes(llama: LlamaConfig) -> int:
    """Bytes of a model's weights in the type they are stored in."""
    elements = sum(math.prod(shape) for entry in entries(llama) for shape in entry.hf_shapes(llama))
    return elements * (4 if llama.dtype == "float32" else 2)


def _decoding_settings(dmc: DMCConfig | None) -> DMCConfig | None:
    """The settings that the exported model carries: none where its cache is not compressed."""
    return dmc if dmc is not None and dmc.compresses else None


def _check_kept_config(kept: Path, llama: LlamaConfig) -> None:
    """The configuration that came with the weights must be the one that the saved arguments describe."""
    if not (kept / "config.json").is_file():
        return
    original, _ = parse_hf_config(kept)
    different = [
        f"{name}: {getattr(original, name)!r} in config.json, {getattr(llama, name)!r} in the saved arguments"
        for name in LlamaConfig.__dataclass_fields__
        if name != "dtype" and getattr(original, name) != getattr(llama, name)
    ]
    if different:
        raise ValueError(f"{kept / 'config.json'} contradicts the checkpoint: {'; '.join(different)}")


def _path(given: Path | str | None) -> Path | None:
    return None if given is None else Path(given)

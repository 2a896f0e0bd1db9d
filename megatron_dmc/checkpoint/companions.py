"""What travels with the weights of a model: its tokenizer's files and the token ids of its configuration."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_dmc.support.files import read_json, write_json

FOLDER = "hugging_face"
"""Folder of a Megatron checkpoint with what Megatron has no place for: config.json and the tokenizer's files."""

COMPANION_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
"""The names that transformers gives to the files beside config.json and the weights."""

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def companion_files(directory: Path) -> list[Path]:
    """The files of a model directory that travel as they are."""
    return [path for name in COMPANION_NAMES if (path := directory / name).is_file()]


def has_tokenizer(directory: Path) -> bool:
    """Whether a directory holds the file that defines a tokenizer."""
    return any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def keep_companions(source: Path, folder: Path, config_json: dict[str, Any]) -> None:
    """Keep what Megatron has no place for in a new folder: the tokenizer's files, and ``config.json`` with ids."""
    folder.mkdir()
    write_json(folder / "config.json", config_json | token_ids(source))
    for path in companion_files(source):
        shutil.copyfile(path, folder / path.name)


def copy_tokenizer(tokenizer: Path | None, folder: Path) -> dict[str, Any]:
    """Copy a tokenizer's files into a model directory and return the token ids that it states.

    Args:
        tokenizer: a Hugging Face directory, a sentencepiece ``.model`` file, or None: there is none.

    Raises:
        ValueError: there is no tokenizer at that path.
    """
    if tokenizer is None:
        return {}
    if tokenizer.is_file() and tokenizer.suffix == ".model":
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        return _sentencepiece_ids(tokenizer)
    if not has_tokenizer(tokenizer):
        raise ValueError(
            f"{tokenizer} is no tokenizer: give a sentencepiece .model file, or a directory with tokenizer.model or "
            "tokenizer.json"
        )
    for path in companion_files(tokenizer):
        shutil.copyfile(path, folder / path.name)
    return token_ids(tokenizer)


def token_ids(directory: Path) -> dict[str, Any]:
    """The ids of special tokens that ``generation_config.json`` or ``config.json`` of a directory states.

    -1 stands for none. Raises ``ValueError`` on anything else that is no id.
    """
    ids: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        stated = read_json(path, 1 << 20) if path.is_file() else {}
        ids |= {key: stated[key] for key in TOKEN_IDS if stated.get(key) not in (None, -1)}
    for key, value in ids.items():
        if not all(type(number) is int and number >= 0 for number in (value if isinstance(value, list) else [value])):
            raise ValueError(f"{directory}: {key}={value!r} is not a token id")
    return ids


def _sentencepiece_ids(model: Path) -> dict[str, Any]:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    found = {"bos_token_id": processor.bos_id(), "eos_token_id": processor.eos_id(), "pad_token_id": processor.pad_id()}
    return {name: number for name, number in found.items() if number >= 0}

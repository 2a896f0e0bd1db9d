"""Text to ids and back: sentencepiece models, ``tokenizer.json`` and Llama 3's ranks behind one small interface.

``megatron_dmc.data.sentencepiece_training`` makes new tokenizers; here they are only read.
"""

from __future__ import annotations

from pathlib import Path

from megatron_dmc.data.tokenizer.base import JSON_FILE, MODEL_FILE, Tokenizer
from megatron_dmc.data.tokenizer.hugging_face import HuggingFaceTokenizer
from megatron_dmc.data.tokenizer.llama3_ranks import Llama3RanksTokenizer, holds_ranks
from megatron_dmc.data.tokenizer.sentencepiece_model import SentencePieceTokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Open the tokenizer at ``path``; ``path`` of the result says which file was taken.

    Args:
        path: a ``.model`` file (sentencepiece, or Llama 3's ranks), a ``tokenizer.json``, or a Hugging Face directory.
            A file that is named counts. Where a directory holds both kinds, ``tokenizer.json`` counts, as in
            transformers (`data check` compares the two).

    Raises:
        ValueError: nothing there, not a tokenizer, or no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of(path)
    if not path.is_file():
        raise ValueError(
            f"no tokenizer at {path}: give a sentencepiece .model file, a {JSON_FILE} or a Hugging Face directory"
        )
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path)
    return Llama3RanksTokenizer(path) if holds_ranks(path) else SentencePieceTokenizer(path)


def _file_of(directory: Path) -> Path:
    for name in (JSON_FILE, MODEL_FILE):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(f"{directory} holds neither {JSON_FILE} nor {MODEL_FILE}: give a tokenizer's directory")

"""Text to ids and back: sentencepiece models and Hugging Face tokenizers behind one small interface.

``sentencepiece_training`` makes new tokenizers; here they are only read.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.companions import companion_files
from megatron_dmc.support.files import sha256_file

SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"


class Tokenizer(ABC):
    """Encodes documents without adding special tokens, prompts with them, and decodes without showing them.

    Attributes:
        vocab_size: ids are below it.
        eod: id that ends a document (``</s>`` of Llama).
        sha256: of the file that defines the tokenizer.
    """

    vocab_size: int
    eod: int

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sha256 = sha256_file(path)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""

    @abstractmethod
    def encode_prompt(self, text: str) -> list[int]:
        """Ids of ``text`` as a model is asked to continue it: with what the tokenizer puts first (``<s>`` of Llama)."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens leave no trace."""

    def files(self) -> list[Path]:
        """The files that a model directory needs in order to hold this tokenizer."""
        return [self._path] + [path for path in companion_files(self._path.parent) if path != self._path]


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model`` file. It cannot tell the character U+2581 from a space."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(path)
        try:
            self._processor = SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        self.vocab_size = self._processor.vocab_size()
        self.eod = self._processor.eos_id()
        if self.eod < 0:
            raise ValueError(f"{path} has no end-of-sequence token, which ends a document: train it with one")
        starts = _read_object(path.parent / "tokenizer_config.json").get("add_bos_token") is True
        self._first = [self._processor.bos_id()] if starts and self._processor.bos_id() >= 0 else []

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        return self._first + self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(token) for token in ids])


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` with its ``tokenizer_config.json`` beside it."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ValueError(f"{path} needs the tokenizers package: pip install 'megatron_dmc[hf]'") from error

        super().__init__(path)
        try:
            self._backend = Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        # A truncation or padding stored in the file would change documents in silence.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = 1 + max(self._backend.get_vocab(with_added_tokens=True).values())
        self.eod = self._end_of_document(path.parent)

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        return self._backend.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def _end_of_document(self, folder: Path) -> int:
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            token = _read_object(folder / name).get("eos_token")
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and (found := self._backend.token_to_id(content)) is not None:
                return found
        raise ValueError(
            f"{folder}: neither tokenizer_config.json nor special_tokens_map.json names an eos_token of the "
            "vocabulary: add it, it ends each document"
        )


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Open the tokenizer at ``path``.

    Args:
        path: a sentencepiece ``.model`` file, a ``tokenizer.json``, or a Hugging Face directory. Where a directory
            holds both kinds, the sentencepiece model counts (`data check` compares the two).

    Raises:
        ValueError: nothing there, not a tokenizer, or no end-of-document token.
    """
    path = Path(path)
    if path.is_dir():
        if (path / SENTENCEPIECE_FILE).is_file():
            return SentencePieceTokenizer(path / SENTENCEPIECE_FILE)
        if (path / HUGGING_FACE_FILE).is_file():
            return HuggingFaceTokenizer(path / HUGGING_FACE_FILE)
        raise ValueError(
            f"{path} holds neither {SENTENCEPIECE_FILE} nor {HUGGING_FACE_FILE}: give a tokenizer's directory"
        )
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: give a sentencepiece .model file or a Hugging Face directory")
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}

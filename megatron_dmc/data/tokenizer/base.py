"""What every tokenizer can do, whatever file defines it."""

from __future__ import annotations

import hashlib
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from megatron_dmc.checkpoint.companions import companion_files
from megatron_dmc.support.files import sha256_file

MODEL_FILE = "tokenizer.model"
"""A sentencepiece model, or the ranks of a byte-pair encoding as Llama 3 has them."""
JSON_FILE = "tokenizer.json"
"""What the tokenizers package reads and writes."""


class Tokenizer(ABC):
    """Encodes documents without adding special tokens, prompts with them, and decodes without showing them.

    A special token that is written out in a text (``<|im_end|>``) is that token where the tokenizer's files name it.

    Attributes:
        path: the file that defines it.
        vocab_size: ids are below it.
        base_vocab_size: ids from it on belong to tokens that were added later, which a model need not have.
        eod: id that ends a document (``</s>`` of Llama 2).
        first: ids that a prompt begins with (``<s>`` of Llama 2).
    """

    file_name = JSON_FILE
    """The name of its file in a model directory."""
    vocab_size: int
    base_vocab_size: int
    eod: int
    first: list[int]

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of ``text``."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; special tokens, and ids that the tokenizer does not have, leave no trace."""

    @abstractmethod
    def token(self, number: int) -> str | None:
        """The token with an id as its vocabulary writes it; None: there is none."""

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of ``text`` as a model is asked to continue it: after :attr:`first`, unless the text begins so itself."""
        ids = self.encode(text)
        return ids if ids[: len(self.first)] == self.first else [*self.first, *ids]

    @property
    def sha256(self) -> str:
        """Of the file, and of the tokens that others add to it."""
        digest, beyond = sha256_file(self.path), self._beyond_file()
        return hashlib.sha256((digest + beyond).encode()).hexdigest() if beyond else digest

    def _beyond_file(self) -> str:
        """The tokens that are not in the file itself; empty where it holds them all."""
        return ""

    def copy_to(self, folder: Path) -> None:
        """Put into an existing folder what a model directory needs in order to hold this tokenizer."""
        shutil.copy(self.path, folder / self.file_name)
        for path in companion_files(self.path.parent):
            # A tokenizer.json would win over the file that was chosen.
            if path.name not in (self.file_name, JSON_FILE):
                shutil.copy(path, folder / path.name)

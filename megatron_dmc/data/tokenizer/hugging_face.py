"""A ``tokenizer.json``, run by the tokenizers package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dmc.data.tokenizer.base import JSON_FILE, Tokenizer
from megatron_dmc.data.tokenizer.config import AddedToken, TokenizerConfig, read_tokenizer_config

if TYPE_CHECKING:
    import tokenizers


class BackendTokenizer(Tokenizer):
    """A tokenizer that the tokenizers package runs, with the tokens that the JSON files beside it add."""

    def __init__(self, path: Path, backend: tokenizers.Tokenizer, config: TokenizerConfig) -> None:
        super().__init__(path)
        self._backend = backend
        self.base_vocab_size = 1 + max(backend.get_vocab(with_added_tokens=False).values(), default=-1)
        self._beyond = _add_tokens(backend, config, self.base_vocab_size)
        for token in self._beyond:
            if backend.token_to_id(token.content) != token.number:
                raise ValueError(
                    f"{path.parent} states the id {token.number} for {token.content!r}, which {path.name} gives to "
                    f"{backend.id_to_token(token.number)!r}: take the files of one model"
                )
        self.vocab_size = _end(backend, self.base_vocab_size)
        self.eod = self._end_of_document(config)
        self.first = self._put_first()

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(number) for number in ids], skip_special_tokens=True)

    def token(self, number: int) -> str | None:
        return self._backend.id_to_token(number)

    def _end_of_document(self, config: TokenizerConfig) -> int:
        number = None if config.eos_token is None else self._backend.token_to_id(config.eos_token)
        if number is None:
            raise ValueError(
                f"{self.path.parent}: neither tokenizer_config.json nor special_tokens_map.json names an eos_token of "
                "the vocabulary: add it, it ends each document"
            )
        return number

    def _put_first(self) -> list[int]:
        """What the tokenizer's own template puts before a text."""
        text, whole = self.encode("a"), self._backend.encode("a").ids
        return next((whole[:cut] for cut in range(len(whole)) if whole[cut : cut + len(text)] == text), [])

    def _beyond_file(self) -> str:
        return json.dumps([(token.number, token.content) for token in self._beyond]) if self._beyond else ""


class HuggingFaceTokenizer(BackendTokenizer):
    """A ``tokenizer.json`` with its ``tokenizer_config.json`` beside it."""

    file_name = JSON_FILE

    def __init__(self, path: Path) -> None:
        package = tokenizers_package(path)
        try:
            backend = package.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises a bare Exception
            raise ValueError(f"{path} is not a Hugging Face tokenizer: {error}") from error
        # A truncation or padding stored in the file would change documents in silence.
        backend.no_truncation()
        backend.no_padding()
        super().__init__(path, backend, read_tokenizer_config(path.parent))


def tokenizers_package(path: Path) -> Any:
    """The tokenizers package, which a file needs.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"{path} needs the tokenizers package: pip install 'megatron_dmc[hf]'") from error
    return tokenizers


def _end(backend: tokenizers.Tokenizer, base_vocab_size: int) -> int:
    """One above the last id of ``backend``."""
    return max(base_vocab_size, 1 + max(backend.get_added_tokens_decoder(), default=-1))


def _add_tokens(backend: tokenizers.Tokenizer, config: TokenizerConfig, base_vocab_size: int) -> list[AddedToken]:
    """Make every special and added token one that ``backend`` finds in texts; returns those it had no id for."""
    import tokenizers

    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    numbers = {content: backend.token_to_id(content) for content in sorted(config.special)}
    special = [AddedToken(content, number) for content, number in numbers.items() if number is not None]
    free = _end(backend, base_vocab_size)
    found, beyond = [], []
    for token in [*config.added, *special]:
        if token.content in known:
            continue
        known.add(token.content)
        if backend.token_to_id(token.content) is None:
            # The package gives the next free id to a new token: those before it are reserved.
            found += [AddedToken(f"<|reserved_token_{number}|>", number) for number in range(free, token.number)]
            free = max(free, token.number) + 1
            beyond.append(token)
        found.append(token)
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    backend.add_tokens(
        [tokenizers.AddedToken(token.content, **{flag: getattr(token, flag) for flag in flags}) for token in found]
    )
    return beyond

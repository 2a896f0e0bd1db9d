"""A sentencepiece model with the tokens that the JSON files beside it add."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_dmc.data.tokenizer.base import MODEL_FILE, Tokenizer
from megatron_dmc.data.tokenizer.config import AddedToken, TokenizerConfig, read_tokenizer_config

WITHOUT_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])
"""``normalizer_spec { add_dummy_prefix: false }`` on the wire; protobuf merges what is appended to a message."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece ``.model`` file. It cannot tell the character U+2581 from a space.

    Without JSON files beside it, texts like ``<s>`` are not special in documents: that is sentencepiece's own reading.
    """

    file_name = MODEL_FILE

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        super().__init__(path)
        try:
            model = path.read_bytes()
            self._processor = SentencePieceProcessor(model_proto=model)
            self._continued = SentencePieceProcessor(model_proto=model + WITHOUT_DUMMY_PREFIX)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        self.base_vocab_size = self._processor.vocab_size()
        config = read_tokenizer_config(path.parent)
        self._legacy = config.legacy
        self._added = {token.content: token for token in self._all_added(config)}
        self._by_number = {token.number: token for token in self._added.values()}
        self._pattern = _pattern(list(self._added.values()))
        self.vocab_size = max(self.base_vocab_size, 1 + max(self._by_number, default=0))
        self.eod = self._number_of(config.eos_token, self._processor.eos_id())
        if self.eod < 0:
            raise ValueError(f"{path} has no end-of-sequence token, which ends a document: train it with one")
        bos = self._number_of(config.bos_token, self._processor.bos_id())
        self.first = [bos] if config.adds_bos and bos >= 0 else []

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, (part, token) in enumerate(self._parts(text)):
            if part:
                continued = number and not self._legacy
                ids += (self._continued if continued else self._processor).encode(part)
            if token is not None:
                ids.append(token.number)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        shown = [int(number) for number in ids if self._is_shown(int(number))]
        texts: list[str] = []
        for is_added, run in itertools.groupby(shown, self._by_number.__contains__):
            if is_added:
                texts += [self._by_number[number].content for number in run]
            else:
                texts.append((self._continued if texts else self._processor).decode(list(run)))
        return "".join(texts)

    def token(self, number: int) -> str | None:
        if number in self._by_number:
            return self._by_number[number].content
        return self._processor.id_to_piece(number) if 0 <= number < self.base_vocab_size else None

    def _parts(self, text: str) -> Iterator[tuple[str, AddedToken | None]]:
        """The text before each added token with that token, then the rest."""
        end = 0
        for match in self._pattern.finditer(text):
            assert match.lastindex is not None
            yield text[end : match.start()], self._added[match[match.lastindex]]
            end = match.end()
        yield text[end:], None

    def _is_shown(self, number: int) -> bool:
        if number in self._by_number:
            return not self._by_number[number].special
        return 0 <= number < self.base_vocab_size

    def _all_added(self, config: TokenizerConfig) -> Iterator[AddedToken]:
        """Special tokens that are pieces of the model, then those with stated ids."""
        for content in sorted(config.special):
            if (number := self._piece(content)) is not None:
                yield AddedToken(content, number)
        yield from config.added

    def _piece(self, content: str) -> int | None:
        number = self._processor.piece_to_id(content)
        return number if self._processor.id_to_piece(number) == content else None

    def _number_of(self, content: str | None, otherwise: int) -> int:
        return self._added[content].number if content in self._added else otherwise

    def _beyond_file(self) -> str:
        beyond = {number: token.content for number, token in self._by_number.items() if number >= self.base_vocab_size}
        return json.dumps(sorted(beyond.items())) if beyond else ""


def _pattern(added: list[AddedToken]) -> re.Pattern[str]:
    """Finds the leftmost, longest added token as a group; the white space that the token takes along is around it."""
    alternatives = []
    for token in sorted(added, key=lambda token: len(token.content), reverse=True):
        before = r"(?<!\w)" * token.single_word + r"\s*" * token.lstrip
        after = r"\s*" * token.rstrip + r"(?!\w)" * token.single_word
        alternatives.append(f"{before}({re.escape(token.content)}){after}")
    return re.compile("|".join(alternatives) or r"(?!)")

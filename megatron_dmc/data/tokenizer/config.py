"""The JSON files beside a tokenizer: its added and special tokens, and what a prompt begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.support.files import read_json

CONFIG_FILE = "tokenizer_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTED = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token wherever it stands.

    Args:
        content: the text.
        number: its id.
        special: it controls the model and is not shown.
        lstrip, rstrip: it takes the white space before or after it along.
        single_word: only where no letter or digit touches it.
        normalized: it is found in the text as the tokenizer normalizes it.
    """

    content: str
    number: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class TokenizerConfig:
    """What ``tokenizer_config.json``, ``special_tokens_map.json`` and ``added_tokens.json`` of a folder say together.

    Attributes:
        added: tokens with stated ids, by id.
        special: texts of all special tokens, with stated ids or without.
        named: texts of those that have a name (``bos_token``), by it.
        adds_bos: whether a prompt begins with ``bos_token``; None: not said. A tokenizer.json has its own template.
        legacy: sentencepiece puts a space before every piece of text between special tokens, not only before the first.
    """

    added: tuple[AddedToken, ...]
    special: frozenset[str]
    named: Mapping[str, str]
    adds_bos: bool | None
    legacy: bool

    @property
    def bos_token(self) -> str | None:
        """Begins a text."""
        return self.named.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Ends a text."""
        return self.named.get("eos_token")


def read_tokenizer_config(folder: Path) -> TokenizerConfig:
    """The files of a folder; each may be absent.

    Raises:
        ValueError: a file that is no JSON object, or an added token without text or id.
    """
    settings = _object(folder / "special_tokens_map.json") | _object(folder / CONFIG_FILE)
    special = frozenset(filter(None, map(_content, _special_tokens(settings))))
    added = {
        content: AddedToken(content, number, special=content in special)
        for content, number in _object(folder / "added_tokens.json").items()
    }
    for number, stated in _mapping(settings.get("added_tokens_decoder")).items():
        token = _added_token(number, stated, folder / CONFIG_FILE)
        added[token.content] = token
    for token in added.values():
        if type(token.number) is not int or token.number < 0:
            raise ValueError(f"{folder}: added token {token.content!r} has the id {token.number!r}: a number is needed")
    return TokenizerConfig(
        added=tuple(sorted(added.values(), key=lambda token: token.number)),
        special=special,
        named={name: content for name in _NAMED if (content := _content(settings.get(name))) is not None},
        adds_bos=adds_bos if isinstance(adds_bos := settings.get("add_bos_token"), bool) else None,
        legacy=settings.get("legacy") is True,
    )


def _special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    found = [settings.get(name) for name in _NAMED]
    for listed in map(settings.get, _LISTED):
        found += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    return found


def _added_token(number: str, stated: Any, path: Path) -> AddedToken:
    content = _content(stated)
    if content is None or not number.isdecimal():
        raise ValueError(f"{path}: added_tokens_decoder holds {number!r}: {stated!r}: an id and a token are needed")
    names = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(content, int(number), **{name: _mapping(stated).get(name) is True for name in names})


def _content(token: Any) -> str | None:
    """A token is stated as its text, or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _object(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}

"""JSON lines: one object per line, one of its fields is the text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_dmc.data.compression import inner_suffix, opened

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
LONGEST_LINE = 1 << 28
"""Bytes of one line: a longer one is a file of another format."""

FIELD_REMEDY = "name its field with --json-key"

OnBad = Callable[[ValueError], None]
"""Takes a bad line or row, which is left out then."""


def is_json_lines(path: Path) -> bool:
    """Whether the name of a file says that it holds JSON lines."""
    return inner_suffix(path) in JSON_LINES_SUFFIXES


def looks_like_json_lines(path: Path, key: str) -> bool:
    """Whether the first line of a file, whatever its name, is a JSON object with a text under ``key``."""
    with opened(path) as stream:
        try:
            return isinstance(_object(stream.readline(LONGEST_LINE)).get(key), str)
        except (ValueError, RecursionError):
            return False


def read_json_lines(path: Path, key: str, on_bad: OnBad | None = None, *, remedy: str = FIELD_REMEDY) -> Iterator[str]:
    r"""The text under ``key`` of each line that is not blank; only ``\n`` ends a line.

    Raises:
        ValueError: a line without such a text and no ``on_bad``, a line above :data:`LONGEST_LINE`, a damaged file.
    """
    with opened(path) as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            place = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise ValueError(f"{place}: longer than {LONGEST_LINE} bytes: is it JSON, one object a line?")
            if line.isspace():
                continue
            try:
                text = _text_in(line, key, place, remedy)
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(error)
                continue
            yield text


def checked_text(text: Any, key: str, place: str, remedy: str = FIELD_REMEDY) -> str:
    """``text`` if it is one.

    Raises:
        ValueError: it is no text, or has half of a surrogate pair, which JSON may escape.
    """
    if not isinstance(text, str):
        raise ValueError(f"{place} has no text under {key!r}: {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not Unicode text: {error}") from error
    return text


def _text_in(line: bytes, key: str, place: str, remedy: str) -> str:
    try:
        value = _object(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}: one object per line is read") from error
    return checked_text(value.get(key), key, place, remedy)


def _object(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value

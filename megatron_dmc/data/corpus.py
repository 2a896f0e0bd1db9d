"""Documents to train on: text files (one document each), JSONL files (one per line), Python's standard library."""

from __future__ import annotations

import json
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

LONGEST_LINE = 1 << 28
"""Bytes of one JSONL line: a longer one is a file of another format."""
TESTS_AND_OTHERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """Files to read, in order. ``text_key`` names the field of a JSONL line that holds the text."""

    files: tuple[Path, ...]
    text_key: str = "text"

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self.files)

    def documents(self) -> Iterator[str]:
        """The documents that are not empty.

        Raises:
            ValueError: a file that is no text, or a JSONL line without the text; file and line are named.
        """
        for path in self.files:
            if path.suffix == ".jsonl":
                yield from filter(None, _lines_of(path, self.text_key))
            elif text := _text_of(path):
                yield text


def user_corpus(paths: Sequence[Path | str], text_key: str = "text") -> Corpus:
    """The user's files, in the order given.

    Raises:
        ValueError: no file given, or something that is not a file.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise ValueError("no input: give text or JSONL files, or --python-source for Python's standard library")
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise ValueError(f"not a file: {', '.join(missing)}: give text files, or JSONL files with the suffix .jsonl")
    return Corpus(files, text_key)


def python_source() -> Corpus:
    """The source of the installed standard library without its tests: real text (11 to 12 MB) on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in library.rglob("*.py")
        if TESTS_AND_OTHERS.isdisjoint(path.relative_to(library).parts)
        # Written when Python was built, and full of that machine's paths.
        and not path.name.startswith("_sysconfigdata")
    ]
    if not files:
        raise ValueError(f"{library} holds no Python source: install Python's standard library as source")
    return Corpus(tuple(sorted(files, key=lambda path: path.relative_to(library).as_posix())))


def _text_of(path: Path) -> str:
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as source:
                return source.read()
        return path.read_bytes().decode("utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _lines_of(path: Path, text_key: str) -> Iterator[str]:
    with open(path, "rb") as stream:
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(line) > LONGEST_LINE:
                raise ValueError(
                    f"{path}, line {number}: longer than {LONGEST_LINE} bytes: is it JSON, one object a line?"
                )
            if line.isspace():
                continue
            yield _text_in(line, text_key, f"{path}, line {number}")


def _text_in(line: bytes, text_key: str, place: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    text = value.get(text_key) if isinstance(value, dict) else None
    if not isinstance(text, str):
        raise ValueError(f"{place} has no text under {text_key!r}: name its field with --json-key")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half of a surrogate pair
        raise ValueError(f"{place} is not Unicode text: {error}") from error
    return text

"""Documents to train on: text files (one document each), JSON lines, Parquet, folders of them, Python's own library."""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.data.compression import COMPRESSIONS, PARQUET_SUFFIX, inner_suffix, needs_pyarrow, opened, pyarrow
from megatron_dmc.data.json_lines import (
    JSON_LINES_SUFFIXES,
    OnBad,
    is_json_lines,
    looks_like_json_lines,
    read_json_lines,
)
from megatron_dmc.data.parquet import read_parquet

TEXT_SUFFIX = ".txt"
FOLDER_SUFFIXES = (*JSON_LINES_SUFFIXES, PARQUET_SUFFIX, TEXT_SUFFIX)
"""What is read of a folder; other files in it (``README.md``) are left out."""
TESTS_AND_OTHERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclass
class BadLines:
    """Counts the lines and rows that are left out because they hold no text."""

    count: int = 0
    first: ValueError | None = None

    def add(self, error: ValueError) -> None:
        """Count one."""
        self.count += 1
        self.first = self.first or error


@dataclass(frozen=True)
class Corpus:
    """Files to read, in order.

    Args:
        files: the files.
        text_key: field of a line, or column, that holds the text.
        names: of the files, in the manifest; without the folders in which they lie on this machine.
        left_out: names of files of a folder that are of no kind that is read.
    """

    files: tuple[Path, ...]
    text_key: str = "text"
    names: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int | None:
        """Size of all texts with what surrounds them; None where files are compressed."""
        if any(path.suffix in (*COMPRESSIONS, PARQUET_SUFFIX) for path in self.files):
            return None
        return sum(path.stat().st_size for path in self.files)

    def documents(self, bad: BadLines | None = None) -> Iterator[str]:
        """The documents that are not empty, read as a stream.

        Args:
            bad: counts bad lines and rows, which are left out; None: the first one is an error.

        Raises:
            ValueError: a file that is no text, or a line without the text; file and line are named.
        """
        for path in self.files:
            yield from filter(None, _documents_of(path, self.text_key, None if bad is None else bad.add))


def user_corpus(paths: Sequence[Path | str], text_key: str = "text") -> Corpus:
    """The user's files in the order given; those of a folder sorted by their path in it.

    Raises:
        ValueError: nothing given, something that is not there, a folder without files to read; pyarrow is missing.
    """
    if not paths:
        raise ValueError("no input: give text, JSONL or Parquet files, or --python-source for Python's library")
    inputs = [Path(path) for path in paths]
    missing = [str(path) for path in inputs if not path.exists()]
    if missing:
        raise ValueError(f"not a file: {', '.join(missing)}: give text, JSONL or Parquet files, or folders of them")
    named: list[tuple[Path, str]] = []
    left_out: list[str] = []
    for path in inputs:
        read, others = _in_folder(path) if path.is_dir() else ([(path, path.name)], [])
        named += read
        left_out += others
    for path, _ in named:
        if needs_pyarrow(path):
            pyarrow(path)  # said before any file is read
    files, names = zip(*named, strict=True)
    return Corpus(files, text_key, names, tuple(left_out))


def python_source() -> Corpus:
    """The source of the installed standard library without its tests: real text (11 to 12 MB) on every machine."""
    library = Path(sysconfig.get_path("stdlib"))
    named = {
        name.as_posix(): path
        for path in library.rglob("*.py")
        if TESTS_AND_OTHERS.isdisjoint((name := path.relative_to(library)).parts)
        # Written when Python was built, and full of that machine's paths.
        and not path.name.startswith("_sysconfigdata")
    }
    if not named:
        raise ValueError(f"{library} holds no Python source: install Python's standard library as source")
    return Corpus(tuple(path for _, path in sorted(named.items())), names=tuple(sorted(named)))


def _in_folder(folder: Path) -> tuple[list[tuple[Path, str]], list[str]]:
    """The files to read with their names, and the names of the others. Hidden files are neither."""
    read, others = [], []
    for path in sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix()):
        inside = path.relative_to(folder)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        name = f"{folder.resolve().name}/{inside.as_posix()}"
        if inner_suffix(path) in FOLDER_SUFFIXES:
            read.append((path, name))
        else:
            others.append(name)
    if not read:
        raise ValueError(f"{folder} holds no file to read: {', '.join(FOLDER_SUFFIXES)}, also with .gz or .zst")
    return read, others


def _documents_of(path: Path, text_key: str, on_bad: OnBad | None) -> Iterator[str]:
    if inner_suffix(path) == PARQUET_SUFFIX:
        return read_parquet(path, text_key, on_bad)
    if is_json_lines(path) or (inner_suffix(path) != ".py" and looks_like_json_lines(path, text_key)):
        return read_json_lines(path, text_key, on_bad)
    return iter([_text_of(path)])


def _text_of(path: Path) -> str:
    try:
        if path.suffix == ".py":
            with tokenize.open(path) as source:
                return source.read()
        with opened(path) as stream:
            return stream.read().decode("utf-8")
    except (UnicodeDecodeError, SyntaxError) as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error

"""Shared by all tests: a small text corpus and a tokenizer trained on it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: many small tests share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from megatron_dmc.data.corpus import Corpus
from megatron_dmc.data.sentencepiece_training import train_tokenizer

VOCABULARY = 360


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The exhaustive tests, and all that train with real ranks, are slow."""
    for item in items:
        if item.get_closest_marker("exhaustive") or "layouts" in item.path.parts:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Forty short documents of code, no two alike."""
    return [
        f"def function_{n}(x):\n\treturn x * {n}  # a comment\n\n\nclass C{n}:\n    value = [{n}]\n" for n in range(40)
    ]


@pytest.fixture(scope="session")
def text_files(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One file per document."""
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{number:02d}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def corpus(text_files: list[Path]) -> Corpus:
    """The files as a corpus."""
    return Corpus(tuple(text_files))


@pytest.fixture(scope="session")
def tokenizer_directory(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on the documents, in both formats."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, VOCABULARY, folder)
    return folder

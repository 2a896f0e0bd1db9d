"""Documents and a tokenizer -> one indexed data set per split, written whole or not at all."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatron_dmc.data.corpus import BadLines, Corpus
from megatron_dmc.data.indexed import IndexedWriter, idx_path
from megatron_dmc.data.manifest import SCHEMA_VERSION, Manifest, write_manifest
from megatron_dmc.data.sentencepiece_training import train_tokenizer
from megatron_dmc.data.tokenizer import Tokenizer, load_tokenizer
from megatron_dmc.support.errors import InfrastructureError
from megatron_dmc.support.files import new_directory, sha256_file
from megatron_dmc.support.progress import progress

SPLITS = ("train", "validation", "test")
BATCH_CHARACTERS = 1 << 20
BATCHES_AHEAD_PER_WORKER = 3


@dataclass(frozen=True)
class Split:
    """Shares of the documents for train, validation and test; they need not add up to 1. 0 leaves a split out."""

    train: float = 90.0
    validation: float = 5.0
    test: float = 5.0

    def __post_init__(self) -> None:
        shares = (self.train, self.validation, self.test)
        if min(shares) < 0 or not sum(shares) > 0:
            raise ValueError(f"split {shares}: give three shares >= 0, one above 0, for example 90,5,5")

    def names(self) -> list[str]:
        """The splits that are written."""
        return [name for name in SPLITS if getattr(self, name) > 0]

    def of(self, text: str) -> str:
        """The split of a document: fixed by its content, so that copies of one document stay together."""
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
        position *= self.train + self.validation + self.test
        if position < self.train:
            return "train"
        return "validation" if position < self.train + self.validation else "test"


def prepare_directory(
    corpus: Corpus,
    directory: Path,
    *,
    tokenizer: Path | int,
    split: Split,
    workers: int = 1,
    overwrite: bool = False,
    bad: BadLines | None = None,
) -> dict[str, Manifest]:
    """Write data sets to a new ``directory``, with a copy of the tokenizer under ``tokenizer/``.

    Args:
        corpus: the documents.
        directory: appears when everything in it is written.
        tokenizer: where it lies, or the vocabulary size of one to train on ``corpus``.
        split: shares of the documents.
        workers: processes that tokenize.
        overwrite: replace an existing directory.
        bad: counts bad lines of the input, which are left out; None: the first one is an error.

    Raises:
        ValueError: bad input, a split without documents, an existing directory.
        InfrastructureError: a worker process died.
    """
    with new_directory(directory, overwrite=overwrite) as beside:
        own = beside / "tokenizer"
        own.mkdir()
        if isinstance(tokenizer, int):
            train_tokenizer(corpus.documents(None if bad is None else BadLines()), tokenizer, own)
        else:
            load_tokenizer(tokenizer).copy_to(own)
        return prepare(corpus, own, beside, split, workers, bad)


def prepare(
    corpus: Corpus, tokenizer_path: Path, directory: Path, split: Split, workers: int = 1, bad: BadLines | None = None
) -> dict[str, Manifest]:
    """Write ``train``, ``validation`` and ``test`` (``.bin``, ``.idx``, ``.json``) into an existing ``directory``.

    Each document ends with the tokenizer's end-of-document token. The files do not depend on ``workers``.

    Raises:
        ValueError: bad input, a split without documents.
        InfrastructureError: a worker process died.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: must be >= 1")
    tokenizer = load_tokenizer(tokenizer_path)
    digest = hashlib.sha256()
    with contextlib.ExitStack() as stack:
        writers = {
            name: stack.enter_context(IndexedWriter(directory / name, tokenizer.vocab_size)) for name in split.names()
        }
        advance = stack.enter_context(progress("tokenizing", corpus.num_bytes, "B"))
        batches = _batches(corpus.documents(bad), digest)
        for texts, documents in _encoded(batches, tokenizer, tokenizer_path, workers):
            for text, tokens in zip(texts, documents, strict=True):
                writers[split.of(text)].add(tokens)
            advance(sum(len(text.encode()) for text in texts))
        empty = [name for name, writer in writers.items() if not writer.num_documents]
        if empty:
            raise ValueError(f"no document fell into {', '.join(empty)}: give more documents, or a split without it")
    source = _Source(digest.hexdigest(), list(corpus.names), bad.count if bad else 0)
    return {name: _finish(directory / name, writer, tokenizer, source) for name, writer in writers.items()}


class _Source(NamedTuple):
    """What all splits were made of."""

    sha256: str
    files: list[str]
    num_bad_lines: int


def _finish(prefix: Path, writer: IndexedWriter, tokenizer: Tokenizer, source: _Source) -> Manifest:
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        num_tokens=writer.num_tokens,
        num_documents=writer.num_documents,
        bin_sha256=writer.bin_sha256,
        idx_sha256=sha256_file(idx_path(prefix)),
        corpus_sha256=source.sha256,
        files=source.files,
        num_bad_lines=source.num_bad_lines,
    )
    write_manifest(prefix, manifest)
    return manifest


def _batches(documents: Iterable[str], digest: hashlib._Hash) -> Iterator[list[str]]:
    """Documents in batches of about equal length; ``digest`` takes each with its length before it."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        data = text.encode()
        digest.update(len(data).to_bytes(8) + data)
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(
    batches: Iterable[list[str]], tokenizer: Tokenizer, tokenizer_path: Path, workers: int
) -> Iterator[tuple[list[str], list[np.ndarray]]]:
    """Each batch with its tokens, in order; never more batches in memory than the workers need."""
    if workers == 1:
        yield from ((texts, encode(texts, tokenizer)) for texts in batches)
        return
    context = multiprocessing.get_context("spawn")
    pending: deque[tuple[list[str], Future[list[np.ndarray]]]] = deque()
    with ProcessPoolExecutor(workers, context) as pool:
        try:
            for texts in batches:
                pending.append((texts, pool.submit(_encode_in_worker, texts, tokenizer_path)))
                if len(pending) > workers * BATCHES_AHEAD_PER_WORKER:
                    first, future = pending.popleft()
                    yield first, future.result()
            for first, future in pending:
                yield first, future.result()
        except BrokenProcessPool as error:
            raise InfrastructureError("a worker process died (out of memory?): try fewer --workers") from error


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    """Ids of each document, the end-of-document token at the end."""
    return [np.array([*tokenizer.encode(text), tokenizer.eod], dtype=np.int32) for text in texts]


def _encode_in_worker(texts: list[str], tokenizer_path: Path) -> list[np.ndarray]:
    return encode(texts, _worker_tokenizer(tokenizer_path))


_worker_tokenizer = functools.cache(load_tokenizer)

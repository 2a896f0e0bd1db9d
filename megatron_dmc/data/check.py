"""Verifies data sets and Megatron's index cache before a job trusts them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np

from megatron_dmc.data.indexed import IndexedTokens, bin_path, idx_path
from megatron_dmc.data.manifest import Manifest, manifest_path, read_manifest
from megatron_dmc.data.tokenizer import load_tokenizer
from megatron_dmc.data.tokenizer.base import JSON_FILE, MODEL_FILE
from megatron_dmc.data.tokenizer.config import read_tokenizer_config
from megatron_dmc.support.files import open_regular, sha256_file
from megatron_dmc.support.findings import Finding

TOKENS_AT_ONCE = 1 << 24
PREPARE_AGAIN = "prepare the data again"
# What NumPy says of a header that is not its own.
_NO_HEADER = (ValueError, KeyError, TypeError, SyntaxError, TokenError, MemoryError, RecursionError)
_REMEDY = "delete it, Megatron builds it again"
PROBE = (
    "Once upon a time, in 1923, 3.14 x 10^-5 = 0.0000314.",
    "def f(x):\n    return [x + 1 for _ in range(10)]\n\n\tif x:\r\n",
    "  two leading spaces, two trailing  ",
    "Łódź, naïve café, 東京, Ελλάδα, 🙂",
)
"""Texts on which two tokenizers must agree: numbers, code, white space, bytes outside the vocabulary."""


def check_data_set(prefix: Path, tokenizer_path: Path | None = None) -> list[Finding]:
    """Compare the data set at ``prefix`` with its own index, its manifest and, where given, the tokenizer.

    Raises:
        ValueError: there is no data set at ``prefix``, or it has no readable manifest.
    """
    for path in (bin_path(prefix), idx_path(prefix), manifest_path(prefix)):
        if not path.is_file():
            raise ValueError(f"{path} is missing: give the prefix of a data set written by `megatron-dmc data prepare`")
    manifest = read_manifest(prefix)
    assert manifest is not None
    findings = [_hash(bin_path(prefix), manifest["bin_sha256"]), _hash(idx_path(prefix), manifest["idx_sha256"])]
    try:
        data = IndexedTokens(prefix)
    except ValueError as error:
        return [*findings, Finding(f"{prefix} index", "failed", str(error))]
    findings += [_counts(prefix, data, manifest), _ids(prefix, data, manifest), _ends(prefix, data, manifest)]
    if tokenizer_path is not None:
        findings.append(_tokenizer(tokenizer_path, manifest))
    return findings


def check_tokenizers_agree(directory: Path) -> list[Finding]:
    """Compare the two tokenizers of a directory that holds both kinds."""
    paths = (directory / MODEL_FILE, directory / JSON_FILE)
    if not all(path.is_file() for path in paths):
        return []
    first, second = map(load_tokenizer, paths)
    name = f"{directory}: {MODEL_FILE} and {JSON_FILE}"
    if first.eod != second.eod:
        return [Finding(name, "failed", f"end of document is {first.eod} and {second.eod}", "use one of the two")]
    probes = [*PROBE, *(f"a{token.content} b" for token in read_tokenizer_config(directory).added)]
    for text in probes:
        ids, other_ids = first.encode(text), second.encode(text)
        if ids != other_ids:
            detail = f"{text!r} becomes {ids[:8]}... and {other_ids[:8]}..."
            return [Finding(name, "failed", detail, "use the tokenizer that the model was trained with")]
    return [Finding(name, "ok", f"agree on {len(probes)} probes")]


def check_cache(directory: Path) -> list[Finding]:
    """Look at Megatron's index cache without opening a pickle: magic, type and size of every array.

    Raises:
        ValueError: ``directory`` does not exist or holds no index.
    """
    paths = sorted(directory.glob("*.npy"))
    if not paths:
        raise ValueError(f"{directory} holds no index: give the folder of --data-cache-path")
    return [_index(path) for path in paths]


def _hash(path: Path, expected: str) -> Finding:
    if sha256_file(path) == expected:
        return Finding(f"{path} SHA-256", "ok", expected[:16])
    return Finding(f"{path} SHA-256", "failed", "differs from the manifest", PREPARE_AGAIN)


def _counts(prefix: Path, data: IndexedTokens, manifest: Manifest) -> Finding:
    found, expected = (len(data), len(data.tokens)), (manifest["num_documents"], manifest["num_tokens"])
    detail = f"{found[0]} documents, {found[1]} tokens"
    if found == expected:
        return Finding(f"{prefix} index", "ok", detail)
    return Finding(f"{prefix} index", "failed", f"{detail}, the manifest says {expected}", PREPARE_AGAIN)


def _ids(prefix: Path, data: IndexedTokens, manifest: Manifest) -> Finding:
    name = f"{prefix} token ids"
    for start in range(0, len(data.tokens), TOKENS_AT_ONCE):
        block = data.tokens[start : start + TOKENS_AT_ONCE]
        low, high = int(block.min()), int(block.max())
        if low < 0 or high >= manifest["vocab_size"]:
            found = low if low < 0 else high
            return Finding(name, "failed", f"id {found}: allowed are 0 to {manifest['vocab_size'] - 1}", PREPARE_AGAIN)
    return Finding(name, "ok", f"all below the vocabulary of {manifest['vocab_size']}")


def _ends(prefix: Path, data: IndexedTokens, manifest: Manifest) -> Finding:
    name = f"{prefix} documents"
    for document in range(len(data)):
        tokens = data.tokens_of(document)
        if not len(tokens) or tokens[-1] != manifest["eod"]:
            return Finding(name, "failed", f"document {document} does not end with id {manifest['eod']}", PREPARE_AGAIN)
    return Finding(name, "ok", f"each ends with id {manifest['eod']}")


def _tokenizer(path: Path, manifest: Manifest) -> Finding:
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 == manifest["tokenizer_sha256"]:
        return Finding(f"{path}", "ok", "is the tokenizer of this data set")
    remedy = "give that one (where a directory holds two, name its file), or prepare the data again"
    return Finding(f"{path}", "failed", "is not the tokenizer of this data set", remedy)


def check_index(path: Path) -> None:
    """Raise ``ValueError`` for a file of Megatron's index cache that is not a whole array of integers.

    Reads the header alone, without pickle; anything but a regular file is not opened.
    """
    with open_regular(path) as stream:
        try:
            shape, dtype = _array_header(stream)
        except _NO_HEADER as error:
            raise ValueError(f"{path} is not a NumPy array: {error!s:.200}; {_REMEDY}") from error
        if dtype.kind not in "iu" or min(shape, default=0) < 0:
            raise ValueError(f"{path} holds {dtype!s:.100} of shape {shape!s:.100}, an index holds integers; {_REMEDY}")
        expected, size = stream.tell() + math.prod(shape) * dtype.itemsize, os.fstat(stream.fileno()).st_size
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, its header asks for {expected}; {_REMEDY}")


def _array_header(stream: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and element type of a file of ``numpy.save``."""
    readers: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype]]] = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    shape, _, dtype = readers[np.lib.format.read_magic(stream)](stream)
    return shape, dtype


def _index(path: Path) -> Finding:
    try:
        check_index(path)
    except ValueError as error:
        return Finding(str(path), "failed", str(error).removesuffix(f"; {_REMEDY}"), _REMEDY)
    return Finding(str(path), "ok", "a whole array of integers")

"""Megatron's indexed data set without Megatron: ``PREFIX.bin`` holds tokens, ``PREFIX.idx`` says where documents lie.

Layout of the index, little endian: 9 bytes of magic, uint64 version (1), uint8 code of the token type, uint64 number of
sequences, uint64 number of document borders; then int32 lengths, int64 byte offsets, int64 document borders (the
first is 0). Here each document is one sequence.
"""

from __future__ import annotations

import hashlib
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_TYPES: dict[int, type[np.integer]] = {4: np.int32, 8: np.uint16}
# Megatron's own border between the two token types.
UINT16_VOCABULARY = 65500


def bin_path(prefix: Path) -> Path:
    """The file of tokens."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document borders."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes one data set, document by document; the index is written when the block ends well.

    ``bin_sha256`` holds the hash of the tokens then.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self._prefix = prefix
        self._code = 8 if vocab_size < UINT16_VOCABULARY else 4
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self.num_tokens = 0

    def __enter__(self) -> Self:
        self._bin = open(bin_path(self._prefix), "wb")
        return self

    def add(self, tokens: np.ndarray) -> None:
        """Append one document of token ids."""
        data = tokens.astype(TOKEN_TYPES[self._code]).tobytes()
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is not None:
            return
        self.bin_sha256 = self._digest.hexdigest()
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        with open(idx_path(self._prefix), "wb") as index:
            index.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(lengths) + 1))
            index.write(lengths.astype("<i4").tobytes())
            index.write(_offsets(lengths, TOKEN_TYPES[self._code]).astype("<i8").tobytes())
            index.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


class IndexedTokens:
    """A data set opened for reading. Every length and offset is compared with the real file sizes first.

    ``tokens`` is the whole stream (mapped, not read), ``tokens_of(i)`` one document.

    Raises:
        ValueError: a file is missing, or says something that the file sizes contradict.
    """

    def __init__(self, prefix: Path | str) -> None:
        self._prefix = Path(prefix)
        for path in (bin_path(self._prefix), idx_path(self._prefix)):
            if not path.is_file():
                raise ValueError(
                    f"{path} is missing: give the prefix of a data set written by `megatron-dmc data prepare`"
                )
        self.dtype, self.lengths, borders = self._read_index()
        starts = np.concatenate(([0], np.cumsum(self.lengths, dtype=np.int64)))
        self._borders = starts[borders]
        path = bin_path(self._prefix)
        expected = int(starts[-1]) * self.dtype.itemsize
        if path.stat().st_size != expected:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, its index says {expected}: prepare it again")
        self.tokens = np.memmap(path, dtype=self.dtype, mode="r") if expected else np.empty(0, self.dtype)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._borders) - 1

    def tokens_of(self, document: int) -> np.ndarray:
        """Token ids of one document, its end-of-document token included."""
        return self.tokens[self._borders[document] : self._borders[document + 1]]

    def _read_index(self) -> tuple[np.dtype, np.ndarray, np.ndarray]:
        """Token type, sequence lengths and document borders (in sequences)."""
        path = idx_path(self._prefix)
        size = path.stat().st_size
        with open(path, "rb") as index:
            header = index.read(HEADER.size)
            if len(header) < HEADER.size:
                raise ValueError(f"{path} has {size} bytes: shorter than the header of an indexed data set")
            magic, version, code, num_sequences, num_borders = HEADER.unpack(header)
            if magic != MAGIC or version != VERSION or code not in TOKEN_TYPES:
                raise ValueError(
                    f"{path} is no index of tokens (version {VERSION}, int32 or uint16): prepare the data again"
                )
            expected = HEADER.size + num_sequences * 12 + num_borders * 8
            if size != expected:
                raise ValueError(f"{path} has {size} bytes, its header asks for {expected}: prepare the data again")
            lengths = np.fromfile(index, "<i4", num_sequences)
            offsets = np.fromfile(index, "<i8", num_sequences)
            borders = np.fromfile(index, "<i8", num_borders)
        dtype = np.dtype(TOKEN_TYPES[code])
        if (lengths < 0).any() or not np.array_equal(offsets, _offsets(lengths, TOKEN_TYPES[code])):
            raise ValueError(f"{path}: lengths and offsets contradict each other: prepare the data again")
        if not num_borders or borders[0] != 0 or borders[-1] != num_sequences or (np.diff(borders) < 0).any():
            raise ValueError(f"{path}: document borders do not rise from 0 to {num_sequences}: prepare the data again")
        return dtype, lengths, borders


def _offsets(lengths: np.ndarray, token_type: type[np.integer]) -> np.ndarray:
    """Byte offset of each sequence, int64."""
    ends = np.cumsum(lengths, dtype=np.int64) * np.dtype(token_type).itemsize
    return np.concatenate((np.zeros(min(1, len(lengths)), np.int64), ends[:-1]))

"""Files of bytes, compressed or not, and what is needed to read them."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

COMPRESSIONS = (".gz", ".zst")
PARQUET_SUFFIX = ".parquet"


def inner_suffix(path: Path) -> str:
    """The suffix that tells what a file holds: ``.jsonl`` of ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed as its suffix says, as a stream.

    Raises:
        ValueError: damaged compressed data, also while the block reads; pyarrow is missing.
    """
    try:
        with _stream(path) as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    except OSError as error:
        if error.errno is not None or path.suffix != ".zst":
            raise
        raise ValueError(f"{path} is damaged: {error}") from error  # pyarrow's, which has no number


def _stream(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        return io.BufferedReader(pyarrow(path).input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def needs_pyarrow(path: Path) -> bool:
    """Whether a file, by its name, is read by pyarrow."""
    return path.suffix == ".zst" or inner_suffix(path) == PARQUET_SUFFIX


def pyarrow(path: Path) -> Any:
    """The pyarrow package, which reads zstd and Parquet.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} needs the pyarrow package: pip install 'megatron_dmc[data]'") from error
    return pyarrow

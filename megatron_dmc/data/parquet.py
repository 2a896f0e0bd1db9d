"""Parquet files: one column is the text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_dmc.data.compression import pyarrow
from megatron_dmc.data.json_lines import OnBad, checked_text

ROWS_AT_ONCE = 1024


def read_parquet(path: Path, key: str, on_bad: OnBad | None = None) -> Iterator[str]:
    """The texts of the column ``key``, read in pieces.

    Raises:
        ValueError: no such column, a row without text and no ``on_bad``, a damaged file; pyarrow is missing.
    """
    pyarrow(path)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise ValueError(f"{path} has no column {key!r}: give one of {', '.join(names)} with --json-key")
            number = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[key]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    try:
                        text = checked_text(value, key, f"{path}, row {number}")
                    except ValueError as error:
                        if on_bad is None:
                            raise
                        on_bad(error)
                        continue
                    yield text
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read: {error}") from error

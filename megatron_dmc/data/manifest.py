"""``PREFIX.json``: what a data set was made of, so that training, evaluation and `data check` can insist on it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_dmc.files import write_json

SCHEMA_VERSION = 1


def manifest_path(prefix: Path) -> Path:
    """The manifest beside ``PREFIX.bin`` and ``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".json")


@dataclass(frozen=True)
class Manifest:
    """Facts about one data set. ``corpus_sha256`` covers the documents of all its splits, in order."""

    tokenizer_sha256: str
    vocab_size: int
    eod: int
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str
    corpus_sha256: str

    def write(self, prefix: Path) -> None:
        """Write the manifest of the data set at ``prefix``."""
        write_json(manifest_path(prefix), {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def read(cls, prefix: Path | str) -> Self:
        """Read the manifest of the data set at ``prefix``.

        Raises:
            ValueError: it is missing, of another schema, or not what :meth:`write` writes.
        """
        path = manifest_path(Path(prefix))
        if not path.is_file():
            raise ValueError(f"{path} is missing: give the prefix of a data set written by `megatron-dmc data prepare`")
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        version = stored.pop("schema_version", None) if isinstance(stored, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path} has schema_version={version!r}, this release reads {SCHEMA_VERSION}: prepare it again"
            )
        types = {field.name: int if field.type == "int" else str for field in dataclasses.fields(cls)}
        if stored.keys() != types.keys() or any(type(stored[name]) is not kind for name, kind in types.items()):
            raise ValueError(f"{path} does not hold exactly {sorted(types)} with their types: prepare the data again")
        return cls(**stored)

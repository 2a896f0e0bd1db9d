"""``PREFIX.json``: what a data set was made of, so that training, evaluation and `data check` can insist on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict, cast, get_origin, get_type_hints

from megatron_dmc.support.files import read_json, write_json

SCHEMA_VERSION = 2
_SINCE_2: dict[str, Any] = {"files": [], "num_bad_lines": 0}
"""What a manifest of version 1 does not say, as it is read."""


class Manifest(TypedDict):
    """Facts about one data set.

    ``corpus_sha256`` covers the documents of all its splits, in order; ``files`` names what they were read from, in
    order; ``num_bad_lines`` counts what was left out of these files because it held no text.
    """

    schema_version: int
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    num_tokens: int
    num_documents: int
    bin_sha256: str
    idx_sha256: str
    corpus_sha256: str
    files: list[str]
    num_bad_lines: int


def manifest_path(prefix: Path) -> Path:
    """The manifest beside ``PREFIX.bin`` and ``PREFIX.idx``."""
    return prefix.with_name(prefix.name + ".json")


def write_manifest(prefix: Path, manifest: Manifest) -> None:
    """Write the manifest of the data set at ``prefix``."""
    write_json(manifest_path(prefix), manifest)


def read_manifest(prefix: Path | str) -> Manifest | None:
    """The manifest of the data set at ``prefix``; None where there is none (the data came from another tool).

    Raises:
        ValueError: it is of another schema, or not what :func:`write_manifest` writes.
    """
    path = manifest_path(Path(prefix))
    if not path.is_file():
        return None
    stored = read_json(path)
    version = stored.get("schema_version")
    if version == 1:
        stored, version = {**_SINCE_2, **stored, "schema_version": SCHEMA_VERSION}, SCHEMA_VERSION
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema_version={version!r}, this release reads 1 and {SCHEMA_VERSION}: prepare it again"
        )
    types = get_type_hints(Manifest)
    kinds = {name: get_origin(kind) or kind for name, kind in types.items()}
    if stored.keys() != types.keys() or any(type(stored[name]) is not kind for name, kind in kinds.items()):
        raise ValueError(f"{path} does not hold exactly {sorted(types)} with their types: prepare the data again")
    return cast(Manifest, stored)

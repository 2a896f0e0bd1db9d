"""SHA-256 of every file of a checkpoint, so that a damaged or partial copy is noticed before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_dmc.support.files import read_json, sha256_file, write_json

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1


def write_manifest(directory: Path, known: dict[str, str] | None = None, **facts: Any) -> None:
    """Write ``manifest.json`` for the files below ``directory``.

    Args:
        known: SHA-256 by relative name, of files that were hashed while they were written.
        facts: what else the manifest should tell about the checkpoint.
    """
    known = known or {}
    files = {}
    for path in _files(directory):
        name = path.relative_to(directory).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
    write_json(directory / FILE_NAME, {"schema_version": SCHEMA_VERSION, **facts, "files": files})


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory; None where there is none.

    Raises:
        ValueError: a damaged manifest, or one of another schema.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return None
    manifest = read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema_version={manifest.get('schema_version')!r}: {SCHEMA_VERSION} is read here")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in files.values()
    ):
        raise ValueError(f"{path} is damaged: it must state bytes and sha256 of every file")
    return manifest


def manifest_problems(directory: Path, *, hashes: bool = True) -> list[str]:
    """What differs between a directory and its manifest, one line per file; empty when it has none.

    Args:
        hashes: compare the SHA-256 of every file (reads all of them); False compares presence and sizes.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return []
    problems = []
    present = {path.relative_to(directory).as_posix(): path for path in _files(directory)}
    for name, entry in sorted(manifest["files"].items()):
        path = present.pop(name, None)
        if path is None:
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif hashes and sha256_file(path) != entry["sha256"]:
            problems.append(f"{name} has another SHA-256 than when it was written")
    return problems + [f"{name} is not in the manifest" for name in sorted(present)]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / FILE_NAME)

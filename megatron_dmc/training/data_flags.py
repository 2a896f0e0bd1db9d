"""The data of a run, looked at before Megatron starts: is it there, can it validate, where do its documents end.

Megatron's own answers are tracebacks, after the model is loaded: about a missing file, or about validation data that
nobody asked for. Without a tokenizer it takes the last id for the end of a document, which in a Llama is another token.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.data.indexed import bin_path, idx_path
from megatron_dmc.data.manifest import read_manifest
from megatron_dmc.support.files import read_bounded, read_json

LIST_BYTES_LIMIT = 1 << 24
"""Of a file that lists prefixes: 100,000 long ones."""
PREFIXES_NAMED = 8
_PATH_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")
_LIST_FLAGS = ("--data-args-path", "--per-split-data-args-path")
_SPLIT = "969,30,1"
"""Megatron's own, of a data set that is not split into files."""


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add Megatron's flags that say where the data is and what it is used for."""
    for flag in _PATH_FLAGS:
        parser.add_argument(flag, nargs="*", default=[])
    for flag in (*_LIST_FLAGS, "--split"):
        parser.add_argument(flag)
    for flag in ("--mock-data", "--eod-mask-loss", "--full-validation"):
        parser.add_argument(flag, action="store_true")
    for flag in ("--eval-iters", "--null-tokenizer-eod-id"):
        parser.add_argument(flag, type=int)


def data_flags(given: argparse.Namespace) -> dict[str, str | None]:
    """Check the data of a run, and complete Megatron's flags by what is known of it.

    Args:
        given: what :func:`add_data_arguments` has parsed, and ``tokenizer_type``.

    Raises:
        ValueError: no data, a data set that is not there, validation without data for it, or documents whose end is
            asked for and not known.
    """
    if given.mock_data:
        return {}
    sources = data_sources(given)
    for flag, prefixes in sources.items():
        for prefix in prefixes:
            _check_prefix(flag, prefix)
    if not any(sources.values()):
        raise ValueError(
            "no training data: give --train-data-path PREFIX, a data set made by `megatron-dmc data prepare`"
        )
    return _validation_flags(given) | _document_flags(given, [prefix for found in sources.values() for prefix in found])


def data_sources(given: argparse.Namespace) -> dict[str, list[str]]:
    """The prefixes that a run reads, by the flag that names them."""
    sources = {flag: _prefixes(getattr(given, flag[2:].replace("-", "_"))) for flag in _PATH_FLAGS}
    if given.data_args_path:
        listed = read_bounded(Path(given.data_args_path), LIST_BYTES_LIMIT).decode("utf-8", "replace").split()
        sources["--data-args-path"] = _prefixes(listed)
    for name, listed in _per_split(given).items():
        sources[f"--per-split-data-args-path ({name})"] = _prefixes(listed)
    return sources


def _per_split(given: argparse.Namespace) -> Mapping[str, list[str]]:
    if not given.per_split_data_args_path:
        return {}
    path = Path(given.per_split_data_args_path)
    listed = read_json(path, LIST_BYTES_LIMIT)
    return {name: _words(value, path) for name, value in listed.items() if value}


def _words(value: Any, path: Path) -> list[str]:
    """A blend in Megatron's file of splits: a list, or one text of words."""
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{path}: a list of weights and prefixes per split is expected")
    return words


def _prefixes(blend: Sequence[str]) -> list[str]:
    """The prefixes of a blend, as Megatron reads it: all words, or every other one behind its weight."""
    weights = blend[::2]
    weighted = len(blend) % 2 == 0 and all(re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", weight) for weight in weights)
    return list(blend[1::2] if weighted else blend)


def _check_prefix(flag: str, prefix: str) -> None:
    path = Path(prefix)
    missing = [str(file) for file in (bin_path(path), idx_path(path)) if path.name and not file.is_file()]
    if "://" in prefix or (path.name and not missing):
        return
    names = sorted(found.stem for found in path.parent.glob("*.idx"))[:PREFIXES_NAMED]
    there = f"data sets in {path.parent}: {', '.join(names)}" if names else f"there is no data set in {path.parent}"
    raise ValueError(
        f"{flag} {prefix}: {' and '.join(missing) or 'no file'} missing; give the path without .bin or .idx ({there})"
    )


def _validation_flags(given: argparse.Namespace) -> dict[str, str | None]:
    """Without validation data there is no validation: Megatron would begin one, and end in a traceback."""
    if _has_validation(given):
        return {}
    if given.eval_iters or given.full_validation:
        asked = "--full-validation" if given.full_validation else f"--eval-iters {given.eval_iters}"
        raise ValueError(f"{asked}: there is no validation data; give --valid-data-path PREFIX, or --eval-iters 0")
    return {"--eval-iters": "0"}


def _has_validation(given: argparse.Namespace) -> bool:
    if given.data_path or given.data_args_path:
        shares = [float(share) for share in re.findall(r"[0-9]*\.?[0-9]+", given.split or _SPLIT)]
        return len(shares) > 1 and shares[1] > 0
    return bool(given.valid_data_path or _per_split(given).get("valid"))


def _document_flags(given: argparse.Namespace, prefixes: Sequence[str]) -> dict[str, str | None]:
    """The end of a document is that of the data, as its manifests state it."""
    ids = {None if manifest is None else manifest["eod"] for manifest in map(read_manifest, prefixes)}
    stated = given.null_tokenizer_eod_id
    if stated is not None and ids not in ({stated}, {None}):
        raise ValueError(f"--null-tokenizer-eod-id {stated}: documents of {prefixes[0]} end with {_listed(ids)}")
    if given.tokenizer_type not in (None, "NullTokenizer") or stated is not None:
        return {}
    if len(ids) == 1 and None not in ids:
        return {"--null-tokenizer-eod-id": str(ids.pop())}
    if given.eod_mask_loss:
        why = "there is no manifest beside the data" if ids == {None} else f"documents end with {_listed(ids)}"
        raise ValueError(
            f"--eod-mask-loss: the end of a document is not known, {why}; state it with --null-tokenizer-eod-id, or "
            "make the data with `megatron-dmc data prepare`"
        )
    return {}


def _listed(ids: set[int | None]) -> str:
    return " or ".join(sorted("an unknown id" if number is None else str(number) for number in ids))

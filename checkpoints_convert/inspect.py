"""``inspect``: what a checkpoint is, from its headers and settings, and what is missing or damaged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.guard import CheckedCheckpoint, examine_location
from megatron_dmc.checkpoint.hf_directory import HuggingFaceDirectory
from megatron_dmc.checkpoint.legacy import LegacyCheckpoint
from megatron_dmc.checkpoint.locate import HUGGING_FACE, LEGACY, locate
from megatron_dmc.checkpoint.manifest import manifest_problems, read_manifest
from megatron_dmc.checkpoint.source import MegatronSource
from megatron_dmc.support.errors import Refused
from megatron_dmc.support.units import amount


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found: ``facts`` for people and programs; ``problems``, none in a whole checkpoint."""

    facts: dict[str, Any]
    problems: list[str]

    def lines(self) -> list[str]:
        """For people."""
        width = max(len(name) for name in self.facts)
        told = [f"{name:<{width}}  {_told(value)}" for name, value in self.facts.items()]
        return told + [f"PROBLEM: {problem}" for problem in self.problems]


def inspect_checkpoint(path: Path | str, *, hashes: bool = True, ignored_settings: Sequence[str] = ()) -> Inspection:
    """Describe the checkpoint at ``path`` without executing anything in it.

    Args:
        hashes: compare every file with the SHA-256 in its manifest (reads all of them).
        ignored_settings: unknown settings of a ``config.json`` that change nothing.

    Raises:
        ValueError: there is no checkpoint, or one that was made to harm (what is damaged is told as a problem).
    """
    location = locate(path)
    files = [file for file in location.directory.rglob("*") if file.is_file()]
    facts: dict[str, Any] = {
        "path": str(path),
        "format": location.format,
        "files": len(files),
        "size": sum(file.stat().st_size for file in files),
    }
    problems: list[str] = []
    checked = _attempt(problems, lambda: examine_location(location))
    if location.format == HUGGING_FACE:
        facts |= _attempt(problems, lambda: _hugging_face_facts(location.directory, ignored_settings)) or {}
    elif checked:
        facts |= _attempt(problems, lambda: _megatron_facts(checked)) or {}
    facts |= _scan_facts(checked) if checked else {}
    problems += _attempt(problems, lambda: manifest_problems(location.directory, hashes=hashes)) or []
    facts |= _attempt(problems, lambda: _manifest_fact(location.directory, hashes)) or {}
    return Inspection(facts, list(dict.fromkeys(problems)))


def _attempt[Found](problems: list[str], look: Callable[[], Found]) -> Found | None:
    """What ``look`` finds; None and one problem more where something is damaged."""
    try:
        return look()
    except Refused:
        raise
    except ValueError as error:
        problems.append(str(error))
        return None


def _hugging_face_facts(path: Path, ignored_settings: Sequence[str]) -> dict[str, Any]:
    directory = HuggingFaceDirectory(path, ignored_settings)
    facts: dict[str, Any] = {"model_type": directory.config_json["model_type"], "tensors": len(directory.tensors)}
    facts |= {"notes": directory.notes} if directory.notes else {}
    return facts | {"model": dataclasses.asdict(directory.config), "dmc": _dmc(directory.dmc)}


def _megatron_facts(checked: CheckedCheckpoint) -> dict[str, Any]:
    location = checked.location
    facts: dict[str, Any] = {"iteration": location.iteration}
    if location.format == LEGACY:
        legacy = LegacyCheckpoint(location.directory)
        sizes = (legacy.tensor_size, legacy.pipeline_size, legacy.virtual_size)
        facts["layout"] = "TP {} x PP {} x VPP {}".format(*sizes)
    source = MegatronSource(checked)
    args = source.saved.args
    if location.format != LEGACY:
        written = [args.get(f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline")]
        facts["layout"] = "any (written at TP {} x PP {})".format(*written)
    facts["iteration"] = source.saved.iteration
    facts["vocabulary"] = f"{source.config.vocab_size}, padded to {source.shape.padded_vocab_size}"
    if not source.states_vocab_size:
        facts["vocabulary"] = f"not stated; the embedding has {source.shape.padded_vocab_size} rows"
    return facts | {"model": dataclasses.asdict(source.config), "dmc": _dmc(source.dmc)}


def _scan_facts(checked: CheckedCheckpoint) -> dict[str, Any]:
    unknown = {"unknown files": ", ".join(checked.unknown)} if checked.unknown else {}
    return {"pickles scanned": checked.pickles} | unknown


def _dmc(settings: Any) -> dict[str, Any] | None:
    return None if settings is None else settings.to_dict()


def _manifest_fact(directory: Path, hashes: bool) -> dict[str, str]:
    manifest = read_manifest(directory)
    if manifest is None:
        return {"manifest": "none: files cannot be checked for damage"}
    return {"manifest": f"{len(manifest['files'])} files, {'SHA-256' if hashes else 'sizes'} compared"}


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={entry}" for name, entry in value.items() if entry is not None)
    if isinstance(value, list):
        return "; ".join(map(str, value))
    return f"{value} bytes ({amount(value, 'B')})" if isinstance(value, int) and value > 1 << 20 else str(value)

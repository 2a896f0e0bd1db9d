"""A directory that belongs to one configuration, and the steps that were finished in it.

``run.json`` holds the configuration and its hash; ``steps/NAME.json`` appears when a step is done, with its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_dmc.runs.layout import LOCK_FILE, RUN_FILE, STEPS_FOLDER
from megatron_dmc.support.files import read_json, write_json


class RunDirectory:
    """An open run. ``step`` does a piece of work once, whatever interrupts the run in between."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of ``work``, from the file of an earlier run where it was finished already."""
        done = self.path / STEPS_FOLDER / f"{name}.json"
        if not done.is_file():
            write_json(done, work())
        return read_json(done, finite=False)


@contextlib.contextmanager
def open_run(path: Path, configuration: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[RunDirectory]:
    """Create the run at ``path``, or continue it when it has the same configuration.

    Args:
        path: of the directory.
        configuration: resolved, ready for JSON.
        overwrite: remove an earlier run first.

    Raises:
        ValueError: another configuration, a directory of something else, or a run that another process works on.
    """
    configuration = json.loads(json.dumps(configuration))
    if overwrite and (path / RUN_FILE).is_file():
        with _locked(path):
            shutil.rmtree(path)
    if not (path / RUN_FILE).is_file():
        if path.exists() and (not path.is_dir() or any(entry.name != LOCK_FILE for entry in path.iterdir())):
            raise ValueError(f"{path} exists and is no run: give a new directory as --output")
        path.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        if any((path / STEPS_FOLDER).glob("*.json")):
            _check_same(path, configuration)
        else:  # a run that has finished nothing may still be changed
            write_json(path / RUN_FILE, {"configuration": configuration, "sha256": configuration_hash(configuration)})
        yield RunDirectory(path)


def configuration_hash(configuration: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()


def _check_same(path: Path, configuration: Mapping[str, Any]) -> None:
    stored = read_json(path / RUN_FILE).get("configuration", {})
    if stored == configuration:
        return
    there, here = flattened(stored), flattened(configuration)
    different = [
        f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    raise ValueError(
        f"{path} holds a run of another configuration:\n"
        + "\n".join(different)
        + "\ngive the same settings to continue "
        "it, another --output, or --overwrite to start anew"
    )


def flattened(configuration: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path / LOCK_FILE, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process works on {path}: wait for it, or give another --output") from None
        yield

"""``metrics.jsonl``: one JSON line per training step, each step once, also after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dmc.runs.directory import METRICS_FILE
from megatron_dmc.support.files import write_text


class MetricsFile:
    """Appends to ``metrics.jsonl`` in ``directory``.

    A run that continues repeats the steps after its checkpoint: before the first line is added, old lines of later
    steps are dropped, and one that a kill has cut off.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / METRICS_FILE
        self._continues = False

    def add(self, line: dict[str, Any]) -> None:
        """Append ``line``, whose ``step`` is above that of every line kept."""
        if not self._continues:
            self._drop_from(line["step"])
            self._continues = True
        with open(self._path, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _drop_from(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            write_text(self._path, "".join(line for line in whole if json.loads(line)["step"] < step))

"""Task files of lm-evaluation-harness, and the local JSON files that they ask about.

Tags that would import Python (``!function``) are refused: what has to be computed is written in Jinja, which the
harness renders outside a sandbox, so a task file must not come from a stranger. Its ``dataset_kwargs.data_files`` are
paths below the folder that the user gives; with ``{subject}`` in them there is one task for every file that is found.
``metadata.fields`` names what every record must have.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dmc.support.files import read_bounded

SHIPPED = Path(__file__).parent / "tasks"
SUFFIXES = (".yaml", ".yml")
SUBJECT = "{subject}"
TASK_BYTES = 1 << 20
DATA_BYTES = 1 << 30
REQUIRED = ("task", "dataset_kwargs", "output_type", "doc_to_text", "doc_to_target", "metric_list")

Records = dict[str, list[dict[str, Any]]]
"""Split -> its records."""


@dataclass(frozen=True)
class TaskFile:
    """One task of the harness with its records.

    Attributes:
        group: the task file that it comes from, which may give several.
        config: for the harness, without its data.
        records: of every split.
    """

    group: str
    config: dict[str, Any]
    records: Records

    @property
    def name(self) -> str:
        """As the harness knows it."""
        return str(self.config["task"])


def shipped_names() -> list[str]:
    """Tasks that come with this package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def read_task(name: str, data: Path) -> list[TaskFile]:
    """The task or tasks of a file.

    Args:
        name: of a shipped task, or path of a task file.
        data: folder of the JSON files.

    Raises:
        ValueError: a field is missing, in the task file or in a record, or a file is missing or no JSON.
    """
    path = Path(name) if name.endswith(SUFFIXES) else SHIPPED / f"{name}.yaml"
    config = _config(path)
    files = config.pop("dataset_kwargs")["data_files"]
    fields = config["metadata"].get("fields", [])
    tasks = []
    for subject in _subjects(files, data):
        own = copy.deepcopy(config)
        if subject is not None:
            own["task"] = f"{config['task']}_{subject}"
        records = {split: read_records(_file(data, file, subject), fields) for split, file in files.items()}
        tasks.append(TaskFile(str(config["task"]), own, records))
    return tasks


def _config(path: Path) -> dict[str, Any]:
    """What a task file says."""
    import yaml

    try:
        config = yaml.safe_load(read_bounded(path, TASK_BYTES))
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is no task file that can be read: {' '.join(str(error).split())} (tags such as !function are not "
            "taken: write Jinja)"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no task file: give the fields {', '.join(REQUIRED)}")
    missing = [field for field in REQUIRED if field not in config]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: a task file needs {', '.join(REQUIRED)}")
    files = config["dataset_kwargs"].get("data_files") if isinstance(config["dataset_kwargs"], dict) else None
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} lacks dataset_kwargs.data_files: give the JSON file of each split, below --data-dir")
    for split, file in files.items():
        if not isinstance(file, str) or Path(file).is_absolute():
            raise ValueError(f"{path} gives {file!r} as the file of {split}: give one path below --data-dir")
    if not isinstance(config.setdefault("metadata", {}), dict):
        raise ValueError(f"{path} gives {config['metadata']!r} as metadata: give fields, or leave it out")
    named = [config.get(f"{kind}_split") for kind in ("training", "validation", "test", "fewshot")]
    absent = [split for split in named if split is not None and split not in files]
    if absent:
        raise ValueError(f"{path} names the split {absent[0]}, for which data_files has no file")
    if not any(config.get(f"{kind}_split") for kind in ("validation", "test")):
        raise ValueError(f"{path} lacks test_split: name the split that is asked about")
    return config


def _subjects(files: Mapping[str, str], data: Path) -> list[str | None]:
    """What ``{subject}`` stands for in the files that are there; [None] where a task has one file a split."""
    pattern = next((file for file in files.values() if SUBJECT in file), None)
    if pattern is None:
        return [None]
    before, after = pattern.split(SUBJECT, 1)
    found = sorted(str(path.relative_to(data)) for path in data.glob(f"{before}*{after}"))
    if not found:
        raise ValueError(f"{data} holds no file {pattern}: give the folder of the task's JSON files with --data-dir")
    return [name[len(before) : len(name) - len(after)] for name in found]


def _file(data: Path, file: str, subject: str | None) -> Path:
    path = data / (file if subject is None else file.replace(SUBJECT, subject))
    if not path.is_file():
        raise ValueError(f"{path} is missing: give the folder of the task's JSON files with --data-dir")
    return path


def read_records(path: Path, fields: list[str]) -> list[dict[str, Any]]:
    """Records of a JSON file: one object a line, or one list of objects.

    Raises:
        ValueError: no JSON, no record, or a record without one of ``fields``.
    """
    try:
        text = read_bounded(path, DATA_BYTES).decode("utf-8")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON, one object a line or one list of objects: {error}") from error
    if not records:
        raise ValueError(f"{path} holds no record")
    for number, record in enumerate(records, start=1):
        missing = [field for field in fields if not isinstance(record, dict) or field not in record]
        if missing:
            raise ValueError(f"{path}, record {number} lacks {', '.join(missing)}: a record has {', '.join(fields)}")
    return records

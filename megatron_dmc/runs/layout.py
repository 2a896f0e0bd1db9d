"""Names of the files and folders of a run: who writes and who reads them agree here.

A run of several stages has a directory per stage; the uncompressed control of a stage lies beside it.
"""

from __future__ import annotations

RUN_FILE = "run.json"
"""Configuration of the run, and its hash."""
STEPS_FOLDER = "steps"
"""One file per finished step of work, with its result."""
LOCK_FILE = ".lock"

METRICS_FILE = "metrics.jsonl"
"""In the directory of a stage: one JSON line per training step."""
DECISIONS_FOLDER = "decisions"
"""In the directory of a stage: what every KV head decided, one file per rank that has heads of its own."""
OUTCOME_FILE = "outcome.json"
"""In the directory of a stage: how its last training ended."""
LOG_FILE = "train.log"
"""In the directory of a stage: what its processes printed."""

DATA_FOLDER = "data"
CACHE_FOLDER = "cache"
"""Megatron's index of the data."""
EVALUATION_FOLDER = "evaluation"
"""One file per model that was measured."""
GENERATION_FILE = "generation.json"
REPORT_FOLDER = "report"

BASE = "base"
"""Training of the model that is retrofitted, where it is made from scratch."""
BASE_HF = "base_hf"
BASE_MEGATRON = "base_megatron"
EXPORT = "export"
CONTROL_PREFIX = "control"


def stage_directory(stage: str, *, control: bool = False) -> str:
    """Name of the directory of a stage, or of its uncompressed control."""
    return f"{CONTROL_PREFIX}_{stage}" if control else stage


def is_control(directory: str) -> bool:
    """Whether :func:`stage_directory` names a control so."""
    return directory.startswith(CONTROL_PREFIX)

"""Calls lm-evaluation-harness with a model of ours and local records."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

from megatron_dmc.evaluation.harness.task_files import TaskFile

BOOTSTRAP = 1000
"""Draws for the error of a metric that is no mean."""
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def go_offline() -> None:
    """Nothing that the harness imports may download; to be called before it is imported."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))


def run_harness(
    model: Any, tasks: Sequence[TaskFile], *, limit: int | None = None, num_fewshot: int | None = None, chat: bool
) -> dict[str, Any]:
    """Results of tasks, ready for JSON.

    Args:
        model: a ``CompressedLM``.
        tasks: with their records.
        limit: the first so many questions of each; None: all.
        num_fewshot: examples before each question; None: as the task says.
        chat: whether questions stand in the chat template.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # It advises on options of records that are made by a function, for every task.
    logging.getLogger("lm_eval.api.task").setLevel(logging.ERROR)
    found = simple_evaluate(
        model=model,
        tasks=[with_data(task) for task in tasks],
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=BOOTSTRAP,
    )
    assert found is not None
    results = {
        name: {
            "metrics": {key: value for key, value in figures.items() if "," in key},
            "num_questions": found["n-samples"][name]["effective"],
            "num_fewshot": found["n-shot"].get(name),
            "version": found["versions"].get(name),
        }
        for name, figures in found["results"].items()
    }
    return {"lm_eval": importlib.metadata.version("lm_eval"), "tasks": results, "groups": _groups(tasks, results)}


def with_data(task: TaskFile) -> dict[str, Any]:
    """A task as the harness takes it, which is handed its records instead of where to find them."""
    from datasets import Dataset

    def records(**_: Any) -> dict[str, Any]:
        return {split: Dataset.from_list(records) for split, records in task.records.items()}

    return {**task.config, "custom_dataset": records}


def _groups(tasks: Sequence[TaskFile], results: dict[str, Any]) -> dict[str, Any]:
    """Means over the tasks of one file, by their numbers of questions; errors as of independent questions."""
    groups: dict[str, Any] = {}
    for group in dict.fromkeys(task.group for task in tasks):
        members = [results[task.name] for task in tasks if task.group == group]
        if len(members) < 2:
            continue
        total = sum(member["num_questions"] for member in members)
        metrics: dict[str, float] = {}
        for metric in (key for key in members[0]["metrics"] if "_stderr" not in key):
            mean = sum(member["metrics"][metric] * member["num_questions"] for member in members) / total
            metrics[metric] = mean
            metrics[metric.replace(",", "_stderr,")] = math.sqrt(mean * (1 - mean) / total)
        groups[group] = {"metrics": metrics, "num_tasks": len(members), "num_questions": total}
    return groups

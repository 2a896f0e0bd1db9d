"""Generated questions about long texts, from the standard library and words of our own: nothing is downloaded."""

from __future__ import annotations

from megatron_dmc.evaluation.tasks.base import Task
from megatron_dmc.evaluation.tasks.frequent_words import FrequentWords
from megatron_dmc.evaluation.tasks.needle import MultiKeyNeedle, Needle
from megatron_dmc.evaluation.tasks.passkey import Passkey
from megatron_dmc.evaluation.tasks.variable_tracking import VariableTracking

__all__ = ["TASKS", "Task"]

TASKS: dict[str, Task] = {
    task.name: task for task in (Passkey(), Needle(), MultiKeyNeedle(), VariableTracking(), FrequentWords())
}
"""Name -> the task. A new one is one more object here."""

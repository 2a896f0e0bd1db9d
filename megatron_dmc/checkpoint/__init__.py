"""Checkpoint files read as data: bounded, checked, and never executed.

``pickles`` describes a pickle without importing anything; ``torch_file``, ``torch_dist`` and ``legacy`` read what
torch and Megatron write through it, ``safetensors_file`` reads safetensors. ``guard`` checks a checkpoint before
Megatron opens it, ``unpickling`` builds objects for Megatron from bytes that were described, ``settings`` tells what
model a checkpoint holds, ``manifest`` whether it is whole.
"""

from megatron_dmc.checkpoint.guard import check_checkpoint
from megatron_dmc.checkpoint.settings import MegatronSettings, read_megatron_settings

__all__ = ["MegatronSettings", "check_checkpoint", "read_megatron_settings"]

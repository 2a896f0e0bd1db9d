"""Whether Triton kernels can compute on some tensors."""

from __future__ import annotations

import functools
import importlib.util

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Element types that the kernels of inference take."""


@functools.cache
def reason_without(device_type: str, dtype: torch.dtype) -> str | None:
    """Why Triton kernels do not run on tensors of ``dtype`` on a kind of device; None where they do."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in DTYPES:
        return f"they do not compute with {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None

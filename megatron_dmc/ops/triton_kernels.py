"""Which operations run as Triton kernels: one choice, said once with its reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Element types that the kernels of inference take."""


@functools.cache
def load(what: str, module: str, device_type: str, dtype: torch.dtype) -> ModuleType | None:
    """The module with the kernels of an operation where they run, None where torch operations do.

    Args:
        what: the operation, for the log.
        module: full name; imported only where it runs.
        device_type: of the tensors.
        dtype: of the model.
    """
    reason = reason_without(device_type, dtype)
    if reason is None:
        logger.info("%s: Triton kernels", what)
        return importlib.import_module(module)
    level = logging.WARNING if device_type == "cuda" else logging.INFO
    logger.log(level, "%s: torch operations, not Triton kernels, because %s", what, reason)
    return None


def reason_without(device_type: str, dtype: torch.dtype) -> str | None:
    """Why kernels do not run; None where they do."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in DTYPES:
        return f"they do not compute with {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None

"""Which implementation of the scan runs where."""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from megatron_dmc.ops.kv_pooling import scan

logger = logging.getLogger(__name__)


class Scans(Protocol):
    """The two functions that every implementation offers, as in ``scan.py``."""

    def gated_scan(
        self, decay_SBG: Tensor, gain_SBG: Tensor | None, x_SBGD: Tensor, reverse: bool = False
    ) -> Tensor: ...

    def gated_scan_backward(
        self,
        decay_SBG: Tensor,
        gain_SBG: Tensor,
        x_SBGD: Tensor,
        y_SBGD: Tensor,
        grad_SBGD: Tensor,
        reverse: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def scans(x: Tensor) -> Scans:
    """Triton kernels for tensors on a GPU, blocked torch operations elsewhere."""
    return _on_device(x.device.type, x.dtype == torch.float64)


@functools.cache
def _on_device(device_type: str, double: bool) -> Scans:
    if device_type != "cuda" or double:
        return scan
    try:
        from megatron_dmc.ops.kv_pooling import kernels
    except ImportError as error:
        logger.warning("pooling runs as torch operations on the GPU, which is slower: Triton is missing (%s)", error)
        return scan
    return kernels

"""Matrices of a model, laid out for the machine that multiplies with them."""

from __future__ import annotations

import functools
import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


class Linear:
    """Multiplies vectors by a matrix and adds a bias, if there is one; inference alone.

    On a CPU the matrix is kept as oneDNN wants it, which takes a half to nine tenths of the time of ``F.linear``: most
    is won by few vectors on several cores.

    Args:
        weight: [out, in].
        bias: [out]; None: there is none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.bias = bias
        self._is_packed = _onednn_packs(weight.device.type, weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight

    @property
    def weight(self) -> Tensor:
        """[out, in], bit for bit as it was given."""
        return self._weight.to_dense() if self._is_packed else self._weight

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        if self._is_packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self.bias, "none", [], None)
            return product
        return F.linear(x, self._weight, self.bias)


@functools.cache
def _onednn_packs(device_type: str, dtype: torch.dtype) -> bool:
    """Whether matrices are packed; says why not, once. The operations are those that torch's own compiler emits."""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if device_type != "cpu":
        return False
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        reason = "this torch comes without oneDNN's"
    elif dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return True
    else:
        reason = f"oneDNN has none for {dtype} on this CPU"
    logger.info("linear layers: plain matrices, not packed ones, because %s", reason)
    return False

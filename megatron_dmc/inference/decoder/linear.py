"""Matrices of a model, laid out for the machine that multiplies with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """Multiplies vectors by a matrix, without a bias; inference alone.

    On a CPU the matrix is kept as oneDNN wants it, which takes a half to nine tenths of the time of ``F.linear``: most
    is won by few vectors on several cores.

    Args:
        weight: [out, in].
    """

    def __init__(self, weight: Tensor) -> None:
        self._is_packed = _can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        if self._is_packed:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], None)
            return product
        return F.linear(x, self._weight)


def _can_pack(weight: Tensor) -> bool:
    """Whether this torch has oneDNN for it. Its two operations are those that torch's own compiler emits."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )

"""Stock attention kernels behind one signature, and the choice among them.

All take fewer KV heads than query heads as they are, and their backward may be given the output and log-sum-exp of
a softmax over more keys than they see: the property on which merging rests.

Shapes: B batch, N query heads, G KV heads, T queries, S keys, D head dim.
"""

from __future__ import annotations

import functools
import logging
from typing import Protocol

import torch
from torch import Tensor

from megatron_dmc.ops.masked_attention import blockwise

logger = logging.getLogger(__name__)
aten = torch.ops.aten

CUDA_MAX_HEAD_DIM = 256
CUDA_HEAD_DIM_MULTIPLE = 8


class Kernel(Protocol):
    """Attention of a rectangle, or of a square with ``causal`` (query i sees keys 0 to i)."""

    def forward(
        self, q_BNTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad_BNTD: Tensor,
        q_BNTD: Tensor,
        k_BGSD: Tensor,
        v_BGSD: Tensor,
        out_BNTD: Tensor,
        lse_BNT: Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class CpuFlash:
    """The flash attention kernel of torch for CPUs: any head dim, float64 too."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


class CudaFlash:
    """FlashAttention 2 as torch carries it."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        results = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return results[0], results[1]

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Without dropout the random state is not read; it only has to be a tensor of the right kind.
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        offset = torch.empty((), dtype=torch.uint64, device=q.device)
        return aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip


def choose(device_type: str, dtype: torch.dtype, head_dim: int) -> tuple[Kernel, str]:
    """The kernel for such inputs, and why it is the one."""
    if device_type == "cpu":
        return CpuFlash, "stock flash attention for CPUs"
    obstacle = _cuda_obstacle(device_type, dtype, head_dim)
    if obstacle is None:
        return CudaFlash, "stock FlashAttention 2"
    return blockwise, f"blocks of torch operations, which is slower: {obstacle}"


def _cuda_obstacle(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if device_type != "cuda":
        return f"no flash attention is known on device {device_type!r}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash attention on a GPU takes float16 and bfloat16, not {dtype}"
    if head_dim > CUDA_MAX_HEAD_DIM or head_dim % CUDA_HEAD_DIM_MULTIPLE:
        return f"flash attention on a GPU takes head dims up to {CUDA_MAX_HEAD_DIM} in eights, not {head_dim}"
    return None


def kernel_for(q: Tensor) -> Kernel:
    """The kernel for these queries; a slower choice is logged once."""
    return _logged_choice(q.device.type, q.dtype, q.shape[-1])


@functools.cache
def _logged_choice(device_type: str, dtype: torch.dtype, head_dim: int) -> Kernel:
    kernel, reason = choose(device_type, dtype, head_dim)
    logger.log(logging.WARNING if kernel is blockwise else logging.DEBUG, "masked attention: %s", reason)
    return kernel

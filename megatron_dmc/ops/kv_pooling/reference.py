"""Pooling as the paper writes it: a loop over time. Slow and plain; the fast forms are tested against it.

Shapes: S sequence, B batch, G KV heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype


def pool_kv(
    k_SBGD: Tensor, v_SBGD: Tensor, alpha_SBG: Tensor, omega_SBG: Tensor, window_size: int = 0
) -> tuple[Tensor, Tensor]:
    """Running means of keys and values inside segments ([DMC] eq. 5 to 7), in float32; any dtype in and out.

    ``window_size`` 0: z_t = alpha_t z_{t-1} + omega_t, and the same for the sums. Otherwise a sum reaches back over
    ``window_size`` tokens, the current one counted, token s weighted by alpha_{s+1} ... alpha_t omega_s.
    """
    dtype = accumulation_dtype(k_SBGD.dtype)
    pool = _segment_means if window_size == 0 else _window_means
    means = []
    for x_SBGD in (k_SBGD, v_SBGD):
        mean = pool(x_SBGD.to(dtype), alpha_SBG.to(dtype)[..., None], omega_SBG.to(dtype)[..., None], window_size)
        means.append(mean.to(x_SBGD.dtype))
    return means[0], means[1]


def _segment_means(x: Tensor, alpha: Tensor, omega: Tensor, window_size: int) -> Tensor:
    total, z = torch.zeros_like(x[0]), torch.zeros_like(omega[0])
    means = []
    for t in range(x.shape[0]):
        z = alpha[t] * z + omega[t]
        total = alpha[t] * total + omega[t] * x[t]
        means.append(total / z)
    return torch.stack(means)


def _window_means(x: Tensor, alpha: Tensor, omega: Tensor, window_size: int) -> Tensor:
    means = []
    for t in range(x.shape[0]):
        total, z = torch.zeros_like(x[0]), torch.zeros_like(omega[0])
        for s in range(max(0, t - window_size + 1), t + 1):
            z = alpha[s] * z + omega[s]
            total = alpha[s] * total + omega[s] * x[s]
        means.append(total / z)
    return torch.stack(means)

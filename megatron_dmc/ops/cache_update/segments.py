"""The compressed cache of every head at once, one token per sequence: the state of open segments, and one step.

Only the newest entry of a head cache ever changes, so its segment is all that must be remembered besides the entries:
running sums in float32, never rounded to the cache's dtype. Source: [DMC] arXiv 2403.09636, algorithm 1.

Legend: B sequences, G KV heads, D head dim, W window_size, K = 2 D + 1 weighted sums (omega k, omega v, omega).
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_shape(head_dim: int, window_size: int) -> tuple[int, ...]:
    """Shape of one head's state: (K,) sums, or with a window (W, K), a ring of the segment's last W tokens."""
    num_sums = 2 * head_dim + 1
    return (num_sums,) if window_size == 0 else (window_size, num_sums)


def update_segments(
    state: Tensor, k_BGD: Tensor, v_BGD: Tensor, alpha_BG: Tensor, omega_BG: Tensor, position_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Append or accumulate one token in every head cache.

    Args:
        state: float32 [B, G, K], or [B, G, W, K] with a window; any finite values where ``alpha_BG`` is false.
        k_BGD, v_BGD: key before RoPE and value of the token.
        alpha_BG: bool, true accumulates into the newest entry, false appends a new one.
        omega_BG: float32 importance, positive.
        position_B: int64 position of the token; token t lives in slot t mod W of the ring.

    Returns:
        The new state, and the newest entry's key (before RoPE) and value, float32 [B, G, D].
    """
    weighted_BGK = weighted_sums(k_BGD, v_BGD, omega_BG)
    if state.dim() == weighted_BGK.dim():
        state = sums_BGK = torch.where(alpha_BG.unsqueeze(-1), state, 0.0) + weighted_BGK
    else:
        slot_BG1K = (position_B % state.shape[2]).view(-1, 1, 1, 1).expand_as(weighted_BGK.unsqueeze(2))
        state = torch.where(alpha_BG[..., None, None], state, 0.0).scatter_(2, slot_BG1K, weighted_BGK.unsqueeze(2))
        # Summed afresh: subtracting the oldest token from a running sum drifts.
        sums_BGK = state.sum(dim=2)
    k_mean_BGD, v_mean_BGD = (sums_BGK[..., :-1] / sums_BGK[..., -1:]).chunk(2, dim=-1)
    return state, k_mean_BGD, v_mean_BGD


def weighted_sums(k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """float32 [..., K]: what a token adds to the sums of its segment."""
    omega = omega.unsqueeze(-1)
    return torch.cat([omega * k, omega * v, omega], dim=-1)

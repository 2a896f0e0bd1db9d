"""The compressed cache of every head at once: the state of open segments, one step, a whole prompt.

Only the newest entry of a head cache ever changes, so its segment is all that must be remembered besides the entries:
running sums in float32, never rounded to the cache's dtype. Source: [DMC] arXiv 2403.09636, algorithm 1.

Legend: S sequence, B batch, G KV heads, D head dim, W window_size, T entries, E = 2 D + 1 weighted sums
(omega k, omega v, omega).
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_shape(head_dim: int, window_size: int) -> tuple[int, ...]:
    """Shape of one head's state: (E,) sums, or with a window (W, E), a ring of the segment's last W tokens."""
    num_sums = 2 * head_dim + 1
    return (num_sums,) if window_size == 0 else (window_size, num_sums)


def update_segments(
    state: Tensor, k_BGD: Tensor, v_BGD: Tensor, alpha_BG: Tensor, omega_BG: Tensor, position_B: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Append or accumulate one token in every head cache.

    Args:
        state: float32 [B, G, E], or [B, G, W, E] with a window; any finite values where ``alpha_BG`` is false.
        k_BGD, v_BGD: key before RoPE and value of the token.
        alpha_BG: bool, true accumulates into the newest entry, false appends a new one.
        omega_BG: float32 importance, positive.
        position_B: int64 position of the token; token t lives in slot t mod W of the ring.

    Returns:
        The new state, and the newest entry's key (before RoPE) and value, float32 [B, G, D].
    """
    weighted_BGE = _weighted(k_BGD, v_BGD, omega_BG)
    if state.dim() == weighted_BGE.dim():
        state = sums_BGE = torch.where(alpha_BG.unsqueeze(-1), state, 0.0) + weighted_BGE
    else:
        slot_BG1E = (position_B % state.shape[2]).view(-1, 1, 1, 1).expand_as(weighted_BGE.unsqueeze(2))
        state = torch.where(alpha_BG[..., None, None], state, 0.0).scatter_(2, slot_BG1E, weighted_BGE.unsqueeze(2))
        # Summed afresh: subtracting the oldest token from a running sum drifts.
        sums_BGE = state.sum(dim=2)
    k_mean_BGD, v_mean_BGD = (sums_BGE[..., :-1] / sums_BGE[..., -1:]).chunk(2, dim=-1)
    return state, k_mean_BGD, v_mean_BGD


def segment_ends(alpha_SBG: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of a prompt come from.

    Args:
        alpha_SBG: hard decisions, false at position 0; positions at or after ``length_B`` are ignored.
        length_B: tokens of each prompt, at least 1.

    Returns:
        int64 [B, G, T], the position of the last token of each segment (0 beyond the entries of a head), and
        int32 [B, G], the number of entries of each head; T is the largest of them.
    """
    sequence_length = len(alpha_SBG)
    position_S11 = torch.arange(sequence_length, device=alpha_SBG.device).view(-1, 1, 1)
    inside_SB1 = position_S11 < length_B.view(1, -1, 1)
    append_SBG = ~alpha_SBG & inside_SB1
    entry_SBG = append_SBG.cumsum(dim=0) - 1
    cache_seqlens_BG = append_SBG.sum(dim=0, dtype=torch.int32)
    num_entries = int(cache_seqlens_BG.max())
    last_SBG = (append_SBG.roll(-1, dims=0) | (position_S11 == length_B.view(1, -1, 1) - 1)) & inside_SB1
    last_SBG[-1] = inside_SB1[-1]
    # Tokens that end no segment write to one column too many, which is cut off.
    column_BGS = torch.where(last_SBG, entry_SBG, num_entries).permute(1, 2, 0)
    position_BGT = torch.zeros(*column_BGS.shape[:2], num_entries + 1, dtype=torch.int64, device=alpha_SBG.device)
    position_BGT.scatter_(2, column_BGS, position_S11.view(1, 1, -1).expand_as(column_BGS))
    return position_BGT[..., :num_entries], cache_seqlens_BG


def open_segment_state(
    k_SBGD: Tensor, v_SBGD: Tensor, alpha_SBG: Tensor, omega_SBG: Tensor, length_B: Tensor, window_size: int
) -> Tensor:
    """State after a prompt, as :func:`update_segments` would have left it.

    Args: as there, for all positions at once; ``length_B`` as in :func:`segment_ends`.

    Returns:
        float32 [B, G, E], or [B, G, W, E].
    """
    position_S11 = torch.arange(len(alpha_SBG), device=alpha_SBG.device).view(-1, 1, 1)
    inside_SB1 = position_S11 < length_B.view(1, -1, 1)
    start_BG = torch.where(~alpha_SBG & inside_SB1, position_S11, 0).amax(dim=0)
    if window_size == 0:
        open_SBG = (position_S11 >= start_BG) & inside_SB1
        omega_open_SBG = torch.where(open_SBG, omega_SBG, 0.0)
        sums = [torch.einsum("sbg,sbgd->bgd", omega_open_SBG, x_SBGD.float()) for x_SBGD in (k_SBGD, v_SBGD)]
        return torch.cat([*sums, omega_open_SBG.sum(dim=0).unsqueeze(-1)], dim=-1)
    # The W positions up to the last one hit every slot of the ring once.
    position_BW = length_B.view(-1, 1) - 1 - torch.arange(window_size, device=length_B.device)
    row_B1 = torch.arange(len(length_B), device=length_B.device).view(-1, 1)
    gathered = [x[position_BW.clamp(min=0), row_B1].transpose(1, 2) for x in (k_SBGD, v_SBGD, omega_SBG)]
    in_segment_BGW = position_BW.unsqueeze(1) >= start_BG.unsqueeze(-1)
    weighted_BGWE = torch.where(in_segment_BGW.unsqueeze(-1), _weighted(*gathered), 0.0)
    slot_BGWE = (position_BW % window_size)[:, None, :, None].expand_as(weighted_BGWE)
    return torch.empty_like(weighted_BGWE).scatter_(2, slot_BGWE, weighted_BGWE)


def _weighted(k: Tensor, v: Tensor, omega: Tensor) -> Tensor:
    """float32 [..., E]: what a token adds to the sums of its segment."""
    omega = omega.unsqueeze(-1)
    return torch.cat([omega * k, omega * v, omega], dim=-1)

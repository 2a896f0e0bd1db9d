"""Decoding with a compressed cache as the paper writes it: one token, one KV head at a time ([DMC] section 3.1).

Shapes: S sequence, B batch, N query heads, G KV heads, R = N / G, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.rope import apply_rope, without_last_channel


@dataclass
class HeadCache:
    """Entries of one (sequence, layer, KV head) and the tokens merged in the newest one, all float32."""

    window_size: int
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    segment: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def update(self, k_D: Tensor, v_D: Tensor, accumulate: bool, omega: Tensor, cos: Tensor, sin: Tensor) -> None:
        """Append a token or merge it into the newest entry, which then carries the position of this token."""
        if accumulate and self.keys:
            self.keys.pop()
            self.values.pop()
        else:
            self.segment.clear()
        self.segment.append((omega, k_D, v_D))
        recent = self.segment[-self.window_size :] if self.window_size else self.segment
        omega, k, v = (torch.stack(part) for part in zip(*recent, strict=True))
        share = (omega / omega.sum())[:, None]
        key = without_last_channel((share * k).sum(0))
        self.keys.append(without_last_channel(apply_rope(key, cos, sin)))
        self.values.append((share * v).sum(0))

    def attend(self, q_RD: Tensor) -> Tensor:
        """Attention of rotated queries over all entries, [R, D]."""
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        return (q_RD @ keys.T * q_RD.shape[-1] ** -0.5).softmax(-1) @ values


def decode(
    q_SBND: Tensor,
    k_SBGD: Tensor,
    v_SBGD: Tensor,
    accumulate_SBG: Tensor,
    omega_SBG: Tensor,
    *,
    cos_sin_S: tuple[Tensor, Tensor],
    window_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention output [S, B, N, D] of every step, and int32 cache lengths [S, B, G] after it.

    Args:
        q_SBND, k_SBGD, v_SBGD: before RoPE, the borrowed channel inside.
        accumulate_SBG: hard decisions, [S, B, 1] if the heads share them; the first token appends whatever its own is.
        omega_SBG: importances, of the same shape.
        cos_sin_S: cosine and sine of all positions, [S, D/2].
        window_size: tokens in the mean of a segment; 0 = the whole segment.
    """
    dtype = accumulation_dtype(k_SBGD.dtype)
    length, batch, num_kv_heads, _ = k_SBGD.shape
    group = q_SBND.shape[2] // num_kv_heads
    accumulate_SBG, omega_SBG = (x.expand(k_SBGD.shape[:-1]) for x in (accumulate_SBG, omega_SBG))
    output = torch.zeros_like(q_SBND)
    lengths = torch.zeros(length, batch, num_kv_heads, dtype=torch.int32)
    for b in range(batch):
        for g in range(num_kv_heads):
            heads = slice(g * group, (g + 1) * group)
            cache = HeadCache(window_size)
            for t in range(length):
                cos, sin = (x[t] for x in cos_sin_S)
                k_D, v_D = k_SBGD[t, b, g].to(dtype), v_SBGD[t, b, g].to(dtype)
                cache.update(k_D, v_D, bool(accumulate_SBG[t, b, g]), omega_SBG[t, b, g], cos, sin)
                q_RD = without_last_channel(q_SBND[t, b, heads].to(dtype))
                output[t, b, heads] = cache.attend(without_last_channel(apply_rope(q_RD, cos, sin))).to(output.dtype)
                lengths[t, b, g] = len(cache.keys)
    return output, lengths

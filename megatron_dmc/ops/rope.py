"""Rotary position embedding in the rotate-half form, for training, evaluation and decoding alike.

Channel d of the first half turns with channel d + D/2 by the angle position * inverse_frequency[d].

Shapes: D head dim; leading dimensions broadcast.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops.precision import accumulation_dtype
from megatron_dmc.ops.rope_scaling import RopeScaling
from megatron_dmc.ops.slices import in_slices


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angle per position of each pair of channels, float32 [D/2], radians.

    Raises:
        ValueError: odd ``head_dim``.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim}: rotary embedding turns pairs of channels, give an even head_dim")
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: long waves are stretched by ``factor``, short ones kept, those between interpolated."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def cos_sin(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles, float32 [..., D/2] for positions [...]; angles are computed in float32."""
    angles = positions.float()[..., None] * inverse_frequencies.to(positions.device)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` [..., D] by ``cos`` and ``sin``, which broadcast against [..., D/2]; the dtype of ``x`` stays."""
    dtype = accumulation_dtype(x.dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def without_last_channel(x: Tensor) -> Tensor:
    """A copy of ``x`` [..., D] with the borrowed channel set to zero."""
    return torch.cat((x[..., :-1], torch.zeros_like(x[..., -1:])), dim=-1)


class Rotation(NamedTuple):
    """Coefficients [S, 1, 1, D] of a rotation of [S, B, H, D]: x' = cos x + sin x, the second x with halves swapped."""

    cos: Tensor
    sin: Tensor
    """Negative in the first half."""


def faded_rotation(cos_SC: Tensor, sin_SC: Tensor, neuron_scale: float) -> Rotation:
    """RoPE with the last channel multiplied by ``neuron_scale`` before and after it.

    ``neuron_scale`` 1 is plain RoPE, 0 takes the borrowed channel out: it does not turn into its partner, and it
    ends as 0. ``cos_SC`` and ``sin_SC`` are [S, D/2].
    """
    faded_SC = torch.cat((sin_SC[:, :-1], neuron_scale * sin_SC[:, -1:]), dim=-1)
    cos_SD, sin_SD = torch.cat((cos_SC, cos_SC), dim=-1), torch.cat((-faded_SC, faded_SC), dim=-1)
    cos_SD[:, -1] *= neuron_scale**2
    return Rotation(cos_SD[:, None, None], sin_SD[:, None, None])


def rotate(x_SBHD: Tensor, rotation: Rotation, dtype: torch.dtype, inverse: bool = False) -> Tensor:
    """The rotation of ``x``, outside autograd, as ``dtype``. ``inverse``: its transpose, which is its backward."""
    slices = list(in_slices(x_SBHD, *rotation))
    if len(slices) == 1:
        return _turned(x_SBHD, rotation, dtype, inverse)
    out_SBHD = torch.empty(x_SBHD.shape, dtype=dtype, device=x_SBHD.device)
    for (x, cos, sin), out in zip(slices, out_SBHD.split(len(slices[0][0])), strict=True):
        out.copy_(_turned(x, Rotation(cos, sin), dtype, inverse))
    return out_SBHD


def _turned(x_SBHD: Tensor, rotation: Rotation, dtype: torch.dtype, inverse: bool) -> Tensor:
    x_SBHD = x_SBHD.to(accumulation_dtype(dtype))
    swapped_SBHD = x_SBHD.roll(x_SBHD.shape[-1] // 2, dims=-1)
    return (x_SBHD * rotation.cos).addcmul_(swapped_SBHD, rotation.sin, value=-1 if inverse else 1).to(dtype)

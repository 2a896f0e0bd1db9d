"""Decision noise as a pure function of where it is used: no random state to save, none to restore.

Every number is a hash of (seed, training step, sequence ordinal, layer, KV head, position), so that all parallel
layouts, a recomputed forward pass and a resumed run draw the same noise. One logistic sample takes the place of
the difference of two Gumbel samples.

Bits are equal on every device: the hash is integer arithmetic modulo 2**64, and the logarithm is made of
operations that IEEE 754 rounds exactly (library logarithms differ between devices in the last bit).

Shapes: S positions, B sequences, G KV heads.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

# splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB

_UNIFORM_BITS = 23
_ATANH_TERMS = 9


def logistic_noise(seed: int, step: int, sequence_B: Tensor, layer: int, head_G: Tensor, position_S: Tensor) -> Tensor:
    """Standard logistic samples at the given coordinates, one per element.

    Args:
        seed: seed of the run.
        step: training step.
        sequence_B: int64 [B], ordinals of the sequences in the order of the data.
        layer: number of the layer in the whole model.
        head_G: int64 [G], numbers of the KV heads in the whole layer.
        position_S: int64 [S], positions in the whole sequence.

    Returns:
        float32 [S, B, G] on the device of ``position_S``; absolute value below 17.
    """
    device = position_S.device
    run = functools.reduce(_absorb, (_as_int64(number, device) for number in (0, seed, step, layer)))
    sequence = _absorb(run, sequence_B.to(device, torch.int64))
    head = _absorb(sequence[:, None], head_G.to(device, torch.int64))
    bits = _absorb(head, position_S.to(torch.int64)[:, None, None])
    return _logistic(_shift_right(bits, 64 - _UNIFORM_BITS))


def _as_int64(value: int, device: torch.device) -> Tensor:
    wrapped = (value + 2**63) % 2**64 - 2**63
    return torch.tensor(wrapped, dtype=torch.int64, device=device)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch shifts int64 arithmetically, so the copies of the sign bit are cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _absorb(state: Tensor, coordinate: Tensor) -> Tensor:
    """Mix one coordinate into the state; a bijection of the coordinate, so distinct ones never collide."""
    x = (state ^ coordinate) + _signed(_GOLDEN_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def _logistic(n: Tensor) -> Tensor:
    """log(u / (1 - u)) for u = (2n + 1) / 2**24, which is never 0 or 1 and symmetric about 1/2."""
    odd = (2 * n + 1).double()
    mantissa, exponent = torch.frexp(odd / (2.0 ** (_UNIFORM_BITS + 1) - odd))
    # log(m) = log(c) + 2 atanh((m - c) / (m + c)); with c = sqrt(1/2) the argument stays below 0.172.
    center = math.sqrt(0.5)
    x = (mantissa - center) / (mantissa + center)
    square = x * x
    series = torch.full_like(x, 1.0 / (2 * _ATANH_TERMS + 1))
    for term in reversed(range(_ATANH_TERMS)):
        series = series * square
        series = series + 1.0 / (2 * term + 1)
    log_mantissa = 2.0 * (x * series)
    return (log_mantissa + (exponent.double() - 0.5) * math.log(2.0)).float()

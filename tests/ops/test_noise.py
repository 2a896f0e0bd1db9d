"""Decision noise: the same numbers wherever they are drawn, distributed as they should be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_dmc.ops import noise
from megatron_dmc.ops.noise import logistic_noise


def draw(seed: int = 1, step: int = 2, layer: int = 3, batch: int = 3, heads: int = 4, length: int = 700) -> Tensor:
    return logistic_noise(seed, step, torch.arange(batch), layer, torch.arange(heads), torch.arange(length))


def test_a_part_of_the_coordinates_gives_that_part_of_the_numbers() -> None:
    """Tensor, data, context and pipeline parallel ranks each draw their own part."""
    whole = draw()
    positions = torch.tensor([5, 699, 0, 128])
    part = logistic_noise(1, 2, torch.tensor([2, 0]), 3, torch.tensor([3]), positions)
    assert torch.equal(part, whole[positions][:, [2, 0]][:, :, [3]])


def test_bits_do_not_change() -> None:
    """A resumed run depends on these numbers."""
    found = logistic_noise(1234, 77, torch.tensor([10**12]), 79, torch.tensor([7]), torch.tensor([0, 1, 131071]))
    assert found.flatten().tolist() == [-0.1462833285331726, -2.3687431812286377, 0.5225022435188293]


def test_hash_is_splitmix64_over_the_coordinates() -> None:
    """The same in Python's unbounded integers."""
    state = 0
    for coordinate in (9, 8, 7, 6, 5, 4):
        x = ((state ^ coordinate) + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        state = x ^ (x >> 31)
    u = (2 * (state >> 41) + 1) / 2**24
    found = logistic_noise(9, 8, torch.tensor([6]), 7, torch.tensor([5]), torch.tensor([4]))
    assert found.item() == torch.tensor(math.log(u / (1 - u))).item()


@pytest.mark.parametrize("coordinate", ["seed", "step", "layer"])
def test_every_coordinate_changes_the_noise(coordinate: str) -> None:
    first, second = (draw(**{coordinate: value}).flatten() for value in (5, 6))
    assert torch.corrcoef(torch.stack((first, second)))[0, 1].abs() < 4 / math.sqrt(first.numel())


def test_neighbours_are_independent() -> None:
    samples = draw(batch=8, heads=8, length=2048)
    limit = 4 / math.sqrt(samples.numel())
    for dim in range(3):
        first = samples.narrow(dim, 0, samples.shape[dim] - 1).flatten()
        second = samples.narrow(dim, 1, samples.shape[dim] - 1).flatten()
        assert torch.corrcoef(torch.stack((first, second)))[0, 1].abs() < limit
        assert torch.corrcoef(torch.stack((first.abs(), second.abs())))[0, 1].abs() < limit


def test_distribution_is_logistic() -> None:
    """Kolmogorov-Smirnov distance to the logistic distribution function, at the 1e-4 level."""
    samples = draw(batch=8, heads=8, length=2048).flatten().double().sort().values
    count = samples.numel()
    distance = (torch.sigmoid(samples) - (torch.arange(count) + 0.5) / count).abs().max()
    assert distance < 2.23 / math.sqrt(count)


def test_logarithm_is_right_for_every_hash() -> None:
    """Also the extreme ones, which are finite and opposite to each other."""
    n = torch.cat((torch.arange(100), torch.arange(0, 2**23, 997), torch.arange(2**23 - 100, 2**23)))
    u = (2 * n + 1).double() / 2**24
    assert torch.equal(noise._logistic(n), (torch.log(u) - torch.log1p(-u)).float())
    assert torch.equal(noise._logistic(2**23 - 1 - n), -noise._logistic(n))


def test_large_coordinates_wrap_without_error() -> None:
    assert draw(seed=2**64 - 1, step=2**40).isfinite().all()

"""Books of rows: random traces against sets, and the errors."""

import random

import pytest

from megatron_dmc.inference.cache.allocator import Allocator, OutOfBlocks


def test_random_trace_against_a_set():
    draw = random.Random(0)
    allocator, held = Allocator(50), set()
    for _ in range(2000):
        if draw.random() < 0.5 and allocator.num_free:
            rows = allocator.allocate(draw.randint(1, allocator.num_free))
            assert not held & set(rows)
            held |= set(rows)
        elif held:
            rows = draw.sample(sorted(held), draw.randint(1, len(held)))
            allocator.release(rows)
            held -= set(rows)
        assert allocator.num_in_use == len(held)
        assert allocator.num_free == allocator.total - len(held)
        allocator.check_integrity()


def test_too_many_rows_is_an_error_that_takes_nothing():
    allocator = Allocator(3)
    allocator.allocate(2)
    with pytest.raises(OutOfBlocks, match="2 rows needed, 1 of 3 free"):
        allocator.allocate(2)
    assert allocator.num_free == 1
    allocator.check_integrity()


def test_releasing_twice_is_a_fault():
    allocator = Allocator(3)
    rows = allocator.allocate(2)
    allocator.release(rows)
    with pytest.raises(AssertionError, match="not in use"):
        allocator.release(rows)
    with pytest.raises(AssertionError, match="released twice"):
        allocator.release([allocator.allocate(1)[0]] * 2)


def test_integrity_names_the_broken_equation():
    allocator = Allocator(3)
    allocator._free.pop()
    with pytest.raises(AssertionError, match=r"free 2 \+ in use 0 != rows 3"):
        allocator.check_integrity()

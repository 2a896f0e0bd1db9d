"""Books of the pool: random traces against a dictionary, and where the blocks of a layer lie."""

import random

import pytest
import torch

from megatron_dmc.inference.cache.blocks import Blocks


def test_random_trace_against_a_dictionary():
    draw, num_layers = random.Random(0), 3
    blocks, holders = Blocks(50, num_layers), dict.fromkeys(range(50), 0)
    for _ in range(400):
        held = [block for block, count in holders.items() if count]
        action = draw.random()
        if action < 0.5:
            is_wanted = torch.rand(num_layers, 7) < draw.random()
            if is_wanted.sum() > 50 - len(held):
                continue
            taken = blocks.take(is_wanted)[is_wanted].tolist()
            assert len(set(taken)) == len(taken)
            assert not set(taken) & set(held)
            holders.update(dict.fromkeys(taken, 1))
        elif held:
            chosen = draw.sample(held, draw.randint(1, len(held)))
            is_meant = torch.tensor([draw.random() < 0.7 for _ in chosen])
            change = blocks.hold if action < 0.7 else blocks.release
            change(torch.tensor(chosen), is_meant)
            for block, meant in zip(chosen, is_meant.tolist(), strict=True):
                holders[block] += (1 if action < 0.7 else -1) * meant
        in_tables = [block for block, count in holders.items() for _ in range(count)]
        blocks.check_integrity(torch.tensor(in_tables, dtype=torch.int64))
        assert blocks.num_in_use == len(set(in_tables))
        assert blocks.num_free == 50 - len(set(in_tables))


def test_the_last_free_blocks_are_found_wherever_they_are():
    blocks = Blocks(12, 3)
    first = blocks.take(torch.ones(3, 4, dtype=torch.bool))
    assert sorted(first.flatten().tolist()) == list(range(12))
    for given_back in ([0, 5, 11], [9, 10, 11], [0, 1, 2]):
        for wanted_by in ([3, 0, 0], [0, 0, 3], [1, 1, 1], [0, 2, 1]):
            blocks.release(torch.tensor(given_back), torch.tensor(True))
            is_wanted = torch.arange(3) < torch.tensor(wanted_by).unsqueeze(-1)
            assert sorted(blocks.take(is_wanted)[is_wanted].tolist()) == given_back


def test_the_blocks_of_a_layer_lie_together():
    """Layers that grow in turns fill their own part of the pool, from its start; one that is full goes on behind it."""
    blocks = Blocks(30, 3)
    for _ in range(4):
        taken = blocks.take(torch.ones(3, 2, dtype=torch.bool))
    assert taken.tolist() == [[6, 7], [16, 17], [26, 27]]
    only_first = torch.ones(1, 6, dtype=torch.bool)
    assert blocks.take(only_first, slice(0, 1)).tolist() == [[8, 9, 18, 19, 28, 29]]
    assert blocks.num_free == 0


def test_integrity_names_the_broken_equation():
    blocks = Blocks(3, 1)
    blocks.take(torch.tensor([[True, True]]))
    blocks.check_integrity(torch.tensor([1, 0]))
    with pytest.raises(AssertionError, match="block 1: holders 1 != places in tables 2"):
        blocks.check_integrity(torch.tensor([0, 1, 1]))
    with pytest.raises(AssertionError, match="block 0: holders 1 != places in tables 0"):
        blocks.check_integrity(torch.tensor([1]))

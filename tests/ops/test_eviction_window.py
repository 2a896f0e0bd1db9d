"""The ring of a window against lists of tokens, one by one and in parts."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch

from megatron_dmc.ops import eviction_window
from megatron_dmc.ops.eviction_window import ALL, Part


@dataclass
class Head:
    """One head cache, written down: the token in every place, and which tokens are marked."""

    window_size: int
    tokens: list[int] = field(default_factory=list)
    marked: list[bool] = field(default_factory=list)

    def add(self, marked: bool) -> int:
        """Place of one more token."""
        position = len(self.marked)
        self.marked.append(marked)
        leaves = position - self.window_size - 1
        if leaves >= 0 and self.marked[leaves]:
            place = self.tokens.index(leaves)
            self.tokens[place] = position
        else:
            place = len(self.tokens)
            self.tokens.append(position)
        return place


def ring_of(window_size: int) -> torch.Tensor:
    """A ring with anything in it."""
    return torch.randint(-9, 9, (1, 1, window_size + 1), dtype=torch.int32)


def contents(ring: torch.Tensor, num_tokens: int) -> dict[int, tuple[int, bool]]:
    """Place and mark of the tokens in a ring."""
    num_slots = ring.shape[-1]
    found = {}
    for token in range(max(0, num_tokens - num_slots), num_tokens):
        value = ring[0, 0, token % num_slots].item()
        found[token] = (value, True) if value >= 0 else (~value, False)
    return found


def part_of(position: int, count: int) -> Part:
    return Part(
        torch.tensor([position]),
        torch.tensor([count]),
        torch.zeros(count, dtype=torch.int64),
        torch.arange(count),
        torch.tensor([count - 1]),
    )


@pytest.mark.parametrize("window_size", [0, 1, 5])
def test_one_token_after_another(window_size: int) -> None:
    random.seed(window_size)
    head, ring = Head(window_size), ring_of(window_size)
    for position in range(40):
        marked, length = random.random() < 0.5, len(head.tokens)
        place, ring = eviction_window.take_place(
            ring, torch.tensor([[marked]]), torch.tensor([[length]], dtype=torch.int32), torch.tensor([position])
        )
        assert place.item() == head.add(marked)
    expected = {token: (head.tokens.index(token), head.marked[token]) for token in contents(ring, 40)}
    assert contents(ring, 40) == expected
    assert len(head.tokens) < 30


@pytest.mark.parametrize("window_size", [0, 1, 5])
def test_parts_keep_what_single_tokens_keep(window_size: int) -> None:
    """What the last token sees stays, wherever it lies; earlier entries are seen as long as the window says."""
    random.seed(window_size)
    head, ring, tokens = Head(window_size), ring_of(window_size), []
    for count in [3, 1, 9, 2, 14, 4]:
        position = len(head.marked)
        marks = [random.random() < 0.5 for _ in range(count)]
        part, length = part_of(position, count), torch.tensor([[len(tokens)]], dtype=torch.int32)
        seen = eviction_window.num_queries(ring, part, len(tokens))[0, 0].tolist()
        for token, number in zip(tokens, seen, strict=True):
            left = token + window_size + 1 - position
            assert number == (left if head.marked[token] and left <= window_size + 1 and left >= 0 else ALL)
        place, ring = eviction_window.take_places(ring, torch.tensor(marks).unsqueeze(-1), length, part)
        for offset, found in enumerate(place[:, 0].tolist()):
            if found >= 0:
                assert found == len(tokens)
                tokens.append(position + offset)
        for marked in marks:
            head.add(marked)
        stays = torch.tensor(
            [number >= count for number in seen] + [True] * (len(tokens) - len(seen)), dtype=torch.bool
        ).view(1, 1, -1)
        ring = eviction_window.move_places(ring, stays.cumsum(-1) - 1)
        tokens = [token for token, kept in zip(tokens, stays[0, 0].tolist(), strict=True) if kept]
        assert sorted(tokens) == sorted(head.tokens)
        assert contents(ring, len(head.marked)) == {
            token: (tokens.index(token), head.marked[token]) for token in contents(ring, len(head.marked))
        }


def test_the_newest_token_is_marked_by_the_one_after_it() -> None:
    ring = torch.tensor([[[~4, ~5, ~6]]], dtype=torch.int32)
    for marked, expected in ((True, [~4, 5, ~6]), (False, [~4, ~5, ~6])):
        found = eviction_window.mark_newest(ring, torch.tensor([[marked]]), torch.tensor([8]))
        assert found.flatten().tolist() == expected

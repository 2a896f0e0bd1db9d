"""Batches in captured steps, with stand-ins for what a GPU would do: a graph runs its step again on the same memory."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.inference.cuda_graphs import CapturedSteps, batch_sizes

capturing = []


class Graph:
    """Replays by running the captured step and writing into the result of the capture."""

    def replay(self):
        self.result.copy_(self.step())

    def pool(self):
        return (id(self), 0)


@contextlib.contextmanager
def capture(graph, pool):
    capturing.append((graph, pool))
    yield
    capturing.pop()


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())


class Memory:
    """A cache of one number per row: a step adds its token to that of its row."""

    def __init__(self):
        self.sums, self.pools, self.runs = torch.zeros(10, dtype=torch.int64), [], []

    def step(self, token_B, row_B, position_B):
        def run():
            is_there_B = row_B >= 0
            self.sums[row_B[is_there_B]] += token_B[is_there_B]
            self.runs.append(len(row_B))
            return torch.stack((self.sums[row_B.clamp(min=0)], position_B), dim=-1)

        result = run()
        if capturing:
            graph, pool = capturing[-1]
            graph.step, graph.result = run, result
            self.pools.append(pool)
        return result


def test_batch_sizes_end_with_the_largest():
    assert batch_sizes(1) == [1]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(9) == [1, 2, 4, 8, 9]


def test_batches_run_in_the_smallest_graph_that_fits():
    memory = Memory()
    steps = CapturedSteps(memory.step, [1, 2, 4], torch.device("cpu"))
    assert not memory.sums.any(), "warm-up or capture changed the cache"
    memory.runs.clear()
    for rows, expected_size in (([7, 2, 5], 4), ([2], 1), ([5, 7, 2, 1], 4), ([9, 2], 2)):
        before = memory.sums.clone()
        tokens = torch.arange(1, 1 + len(rows))
        result = steps(tokens, torch.tensor(rows), 10 * tokens)
        before[rows] += tokens
        assert torch.equal(memory.sums, before), "other rows changed"
        assert torch.equal(result, torch.stack((before[rows], 10 * tokens), dim=-1))
        assert memory.runs.pop() == expected_size


def test_captures_share_the_memory_of_the_largest():
    memory = Memory()
    CapturedSteps(memory.step, [1, 2, 4], torch.device("cpu"))
    assert memory.runs == [4] * 3 + [2] * 3 + [1] * 3
    assert memory.pools[0] is None
    assert None not in memory.pools[1:]

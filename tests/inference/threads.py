"""Ranks of tensor parallelism as threads of one process, in place of a process group."""

import threading

import torch
import torch.distributed as dist

from megatron_dmc.inference.decoder.parallel import TensorParallel

WAIT_S = 60
"""A rank that waits longer has been left alone: the test fails instead of hanging."""


class _Meeting:
    """Where all ranks lay down what they have, and take up what the others laid down."""

    def __init__(self, size):
        self.places = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank, kind, x):
        """What every rank gave; each must do the same kind of operation on the same shape."""
        self.places[rank] = (kind, x)
        self.barrier.wait(WAIT_S)
        found = list(self.places)
        self.barrier.wait(WAIT_S)
        assert {given[0] for given in found} == {kind}, f"ranks have diverged: {[given[0] for given in found]}"
        return [given[1] for given in found]


class Threads(TensorParallel):
    """One of several ranks of a meeting."""

    def __init__(self, meeting, size, rank):
        super().__init__(size, rank)
        self.meeting = meeting

    def _reduce(self, x, operation):
        parts = torch.stack(self.meeting.exchange(self.rank, ("reduce", x.shape, x.dtype), x.clone()))
        return x.copy_(parts.sum(0) if operation == dist.ReduceOp.SUM else parts.amax(0))

    def _gather(self, x):
        return self.meeting.exchange(self.rank, ("gather", x.shape, x.dtype), x)

    def _gather_objects(self, x):
        return self.meeting.exchange(self.rank, "objects", x)


def on_ranks(size, run):
    """``run(parallel)`` on every rank at once; what they return, in their order. The first failure is raised."""
    meeting, results, errors = _Meeting(size), [None] * size, []

    def work(rank):
        try:
            results[rank] = run(Threads(meeting, size, rank))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results

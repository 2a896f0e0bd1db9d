"""A command on the ranks that torchrun started: the first of them speaks, and a failure ends all with one message."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from megatron_dmc.support.errors import EXIT_INFRASTRUCTURE

if TYPE_CHECKING:
    from megatron_dmc.inference.decoder.parallel import TensorParallel

SECONDS_TO_TELL = 1.0


def num_ranks() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def num_ranks_here() -> int:
    """How many of them on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def on_all_ranks() -> Iterator[TensorParallel]:
    """Run a block on all ranks, which hold a model together; what the others than the first print is dropped.

    The first rank that fails raises; one that fails later, mostly because it lost the first one, exits in silence.
    """
    from megatron_dmc.inference.decoder.parallel import ALONE, TensorParallel

    if num_ranks() == 1:
        yield ALONE
        return
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://"))
    with _only_first_speaks(rank):
        try:
            yield TensorParallel.join(store, rank, size)
        except BaseException:
            if not _fails_first(store):
                # torchrun ends the others as soon as one is gone: the first one is still telling why.
                time.sleep(SECONDS_TO_TELL)
                raise SystemExit(EXIT_INFRASTRUCTURE) from None
            raise
        dist.destroy_process_group()


@contextlib.contextmanager
def _only_first_speaks(rank: int) -> Iterator[None]:
    if rank == 0:
        yield
        return
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _fails_first(store: Any) -> bool:
    try:
        return store.add("failed", 1) == 1
    except RuntimeError:
        # The process that kept the store is gone, and said why.
        return False

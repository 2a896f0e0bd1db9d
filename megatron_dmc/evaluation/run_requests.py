"""Runs requests to their ends for a measurement, which has no use for one that failed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dmc.inference.engine import Engine
from megatron_dmc.inference.request import Request
from megatron_dmc.support.errors import InfrastructureError
from megatron_dmc.support.progress import Advance


def run_requests(engine: Engine, requests: Sequence[Request], advance: Advance | None = None) -> None:
    """Continue ``requests`` until all have ended.

    Args:
        advance: called with the numbers of new tokens that were written or are not needed any more.

    Raises:
        ValueError: a request that the model cannot read; nothing was read.
        InfrastructureError: one failed on the way.
    """
    engine.submit(requests)
    done = 0
    while engine.is_busy:
        engine.step()
        now = sum(request.progress for request in requests)
        if advance is not None:
            advance(now - done)
        done = now
    for number, request in enumerate(requests):
        if request.error:
            raise InfrastructureError(f"text {number} of {len(requests)} failed: {request.error}")

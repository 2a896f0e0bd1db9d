"""How the threads of one computation wait for each other."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

SPIN_COUNT = 1_000
"""Looks of a waiting thread before it sleeps. libgomp takes as many where it knows that threads share a core."""
_GPU_DRIVER = Path("/dev/nvidiactl")


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep soon after they have nothing to do; to be called before torch is loaded.

    As many threads as cores look 300,000 times, for milliseconds, and so keep a core from the process that the others
    wait for: beside one or two busy processes on two cores, each token of a model of 135M parameters took 2 to 5 times
    as long. What a user asks for stays, and nothing changes where there is a GPU.
    """
    if "OMP_WAIT_POLICY" not in environment and not _GPU_DRIVER.exists():
        environment.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))

"""Rank and rendezvous of this process: from torchrun, from srun, or alone."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping


def complete_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and, for a single process, MASTER_ADDR and MASTER_PORT where they are missing.

    torchrun has set all of them. Under srun with one task per GPU the ranks come from Slurm; the address must come
    from the batch script, because a guess would let every node train alone.

    Raises:
        ValueError: several tasks, and no MASTER_ADDR or MASTER_PORT.
    """
    if "RANK" in environment:
        return
    tasks = int(environment.get("SLURM_NTASKS", "1")) if "SLURM_PROCID" in environment else 1
    if tasks > 1:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise ValueError(
                f"srun started {tasks} tasks, but {' and '.join(missing)} is not set: export both in the batch script "
                "(launch/train.sbatch shows how)"
            )
        environment["RANK"] = environment["SLURM_PROCID"]
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        environment["WORLD_SIZE"] = str(tasks)
        return
    environment.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
    environment.setdefault("MASTER_PORT", str(_free_port()))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

"""What a rank does with a tensor that it sends to the next pipeline stage: Megatron gives its memory up at once."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import torch

NUM_SENDS = 8
SHAPE = (512, 4, 256)
"""2 MB: more than a socket takes at once, so that a send is still under way when the call that starts it returns."""


def send_and_give_up(batched: bool) -> int:
    """Rank 0 sends, frees and reuses the memory; rank 1 reads late. Returns how many tensors arrived damaged."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    torch.distributed.init_process_group("gloo")
    config = SimpleNamespace(
        virtual_pipeline_model_parallel_size=None,
        variable_seq_lengths=False,
        mtp_standalone=False,
        pipeline_dtype=torch.float32,
        use_ring_exchange_p2p=False,
        batch_p2p_comm=batched,
        batch_p2p_sync=True,
        timers=None,
    )
    communicator = P2PCommunicator(torch.distributed.group.WORLD, config)
    is_sender = os.environ["RANK"] == "0"
    return sum(_send(communicator, n) if is_sender else _receive(communicator, n) for n in range(NUM_SENDS))


def _send(communicator: Any, number: int) -> int:
    from megatron.core.pipeline_parallel.schedules import deallocate_output_tensor

    output = torch.full(SHAPE, float(number))
    communicator.send_forward(output, is_last_stage=False)
    deallocate_output_tensor(output, deallocate_pipeline_outputs=True)
    # Takes the memory that was just given up.
    torch.full(SHAPE, float("nan"))
    return 0


def _receive(communicator: Any, number: int) -> int:
    time.sleep(0.02)
    received = communicator.recv_forward(torch.Size(SHAPE), is_first_stage=False)
    return int(not torch.equal(received, torch.full(SHAPE, float(number))))

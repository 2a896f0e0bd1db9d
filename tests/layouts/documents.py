"""What every rank is told about the documents in its micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_dmc.training import forward_step, pretrain


def train(argv: list[str]) -> list[tuple[list[list[int]], np.ndarray | None]]:
    """Per micro-batch of this rank: starts of the documents in each row, and its tokens where it has them."""
    seen: list[tuple[list[list[int]], np.ndarray | None]] = []
    describe = forward_step._microbatch

    def described(model: Any, config: Any, batch: dict[str, Any]) -> Any:
        microbatch = describe(model, config, batch)
        tokens = batch["tokens"]
        seen.append((microbatch.geometry.documents, None if tokens is None else tokens.numpy().copy()))
        return microbatch

    forward_step._microbatch = described
    pretrain.train(argv)
    return seen

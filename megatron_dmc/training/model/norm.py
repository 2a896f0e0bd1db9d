"""RMSNorm for the local spec under sequence parallelism, which Megatron offers only with Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch


class DMCRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose gradient Megatron sums over the sequence-parallel ranks.

    Args:
        config: transformer configuration; ``normalization`` must be RMSNorm.
        hidden_size: channels, the last dimension of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps=eps)
        # finalize_model_grads looks for this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

"""The dtype in which sums are accumulated."""

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs (gradient checks), float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32

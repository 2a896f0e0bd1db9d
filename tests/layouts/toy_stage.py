"""A stage that the product does not know: after ``consolidate`` the ratio is held a little above its target."""

from __future__ import annotations

from typing import Any

from megatron_dmc.stages import DMC, NEURON, STAGES, LearningRate, Published, Stage, register


def slightly_above(step: int, ramp_steps: float, final_cr: float) -> float:
    """A tenth more than ``final_cr``."""
    return 1.1 * final_cr


HOLD = Stage(
    "hold",
    follows=("consolidate",),
    compresses=True,
    target_cr=slightly_above,
    published={(DMC, NEURON): Published(learning_rate=LearningRate(3e-6, 3e-6))},
)


def know_hold() -> None:
    """Register the stage in this process."""
    if HOLD.name not in STAGES:
        register(HOLD)


def train_hold(argv: list[str]) -> Any:
    """``probe.train`` in a process that knows the stage."""
    from tests.layouts import probe

    know_hold()
    return probe.train(argv)


def measure_hold(checkpoint: Any) -> tuple[float, float]:
    """Compression ratios of a checkpoint of the stage, by whole sequences and by decoding."""
    import torch

    from megatron_dmc.checkpoint.source import open_source
    from megatron_dmc.evaluation.perplexity import BOTH, evaluate
    from megatron_dmc.inference.decoder.decoder import Decoder

    know_hold()
    model = Decoder(open_source(checkpoint), dtype="float32")
    result = evaluate(model, torch.arange(4 * 33).reshape(4, 33) * 7 % 119, path=BOTH)
    assert not result.agreement.failures()
    return result.teacher_forced.compression_ratio, result.decode.compression_ratio

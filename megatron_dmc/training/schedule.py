"""What changes during a stage: pure functions of step, length of the stage and settings.

Nothing here has a state: a resumed run needs only its step.
"""

from __future__ import annotations


def accumulate_fraction(compression_ratio: float) -> float:
    """Share of tokens merged into an entry at a compression ratio >= 1 ([DMC] section 3.2)."""
    return 1.0 - 1.0 / compression_ratio


def target_cr(stage: str, step: int, stage_steps: int, final_cr: float) -> float:
    """Compression ratio that the loss asks for at a step ([DMC] section 3.3).

    Args:
        stage: one of ``config.STAGES``.
        step: steps done before this one, 0-based.
        stage_steps: length of the stage.
        final_cr: ratio at the end of ``retrofit``, kept in ``consolidate``.

    Returns:
        1 in ``off`` and ``zero_out``; a line from 1 that reaches ``final_cr`` in the last step of ``retrofit``;
        ``final_cr`` in ``consolidate``.
    """
    if stage == "consolidate":
        return final_cr
    if stage != "retrofit":
        return 1.0
    progress = min(1.0, (step + 1) / stage_steps)
    return 1.0 + (final_cr - 1.0) * progress


def neuron_scale(step: int, stage_steps: int, zero_out_fraction: float) -> float:
    """Factor of the borrowed channel in stage ``zero_out``: from 1 to 0, then 0 for the rest (code of [DMC])."""
    return max(0.0, 1.0 - step / (zero_out_fraction * stage_steps))

"""Compares the measured compression ratio with its target during ``retrofit`` and ``consolidate``."""

from __future__ import annotations

from collections import deque

WINDOW_STEPS = 50
TOLERANCE = 0.1


class RatioWatch:
    """Keeps the ratios of the last steps and says when they stay away from the target.

    A step's ratio is noisy, so the mean of ``window`` steps is judged, and once per window.
    """

    def __init__(self, window: int = WINDOW_STEPS) -> None:
        self._fractions: deque[float] = deque(maxlen=window)
        self._since_message = 0

    def ratio(self) -> float:
        """Compression ratio over the last steps: tokens over cache entries."""
        return 1.0 / (1.0 - sum(self._fractions) / len(self._fractions))

    def observe(self, measured_cr: float, target_cr: float) -> str | None:
        """Take in one step; a sentence with what to change when the ratio stays off its target, else None."""
        self._fractions.append(1.0 - 1.0 / measured_cr)
        self._since_message += 1
        if self._since_message < (self._fractions.maxlen or 1):
            return None
        self._since_message = 0
        ratio = self.ratio()
        if ratio < (1 - TOLERANCE) * target_cr:
            return (
                f"compression ratio {ratio:.2f} stays below its target {target_cr:.2f} (the compression loss is open): "
                "raise --dmc-loss-weight or the learning rate, or give retrofit more steps"
            )
        if ratio > (1 + TOLERANCE) * target_cr:
            return (
                f"compression ratio {ratio:.2f} exceeds its target {target_cr:.2f}: the one-sided loss does not pull "
                "it back; lower the learning rate, or stop at a ratio with --dmc-stop-at-cr"
            )
        return None

"""The measured compression ratio over the last steps, and whether it keeps to its target."""

from __future__ import annotations

from collections import deque

WINDOW_STEPS = 50
TOLERANCE = 0.1


class RunningRatio:
    """The compression ratio over the last ``window`` steps: tokens over cache entries. A step's own is noisy."""

    def __init__(self, window: int) -> None:
        self.window = window
        self._fractions: deque[float] = deque(maxlen=window)

    def observe(self, measured_cr: float) -> None:
        """Take in one step."""
        self._fractions.append(1.0 - 1.0 / measured_cr)

    @property
    def ratio(self) -> float:
        """Over the steps seen so far, at least one and at most ``window``."""
        return 1.0 / (1.0 - sum(self._fractions) / len(self._fractions))

    def reached(self, ratio: float) -> bool:
        """Whether a whole window lies at or above ``ratio``."""
        return len(self._fractions) == self.window and self.ratio >= ratio


class RatioWatch:
    """Says when the ratio stays away from its target in a compressing stage, once per window."""

    def __init__(self, window: int = WINDOW_STEPS) -> None:
        self._recent = RunningRatio(window)
        self._since_message = 0

    def observe(self, measured_cr: float, target_cr: float) -> str | None:
        """Take in one step; a sentence with what to change when the ratio stays off its target, else None."""
        self._recent.observe(measured_cr)
        self._since_message += 1
        if self._since_message < self._recent.window:
            return None
        self._since_message = 0
        ratio = self._recent.ratio
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

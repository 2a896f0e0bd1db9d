"""What a long conversion tells while it runs: share, bytes, speed and time left."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_REDRAWS = 0.2


class Progress:
    """Counts bytes and reports them: one line that is drawn anew on a terminal, otherwise a line every ten seconds.

    Several threads may count.
    """

    def __init__(self, label: str, total_bytes: int, stream: TextIO | None = None) -> None:
        self.label = label
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._stream = stream or sys.stderr
        self._on_terminal = self._stream.isatty()
        self._lock = threading.Lock()
        self._started = self._last = time.monotonic()

    def add(self, count: int) -> None:
        """Count ``count`` more bytes."""
        with self._lock:
            self.done_bytes += count
            now = time.monotonic()
            if now - self._last >= (_SECONDS_BETWEEN_REDRAWS if self._on_terminal else _SECONDS_BETWEEN_LINES):
                self._last = now
                self._write("" if self._on_terminal else "\n")

    def finish(self) -> None:
        """Report the end."""
        self._write("\n")

    def _write(self, after: str) -> None:
        seconds = max(time.monotonic() - self._started, 1e-9)
        share = min(self.done_bytes / self.total_bytes, 1.0) if self.total_bytes else 1.0  # headers count as done too
        left = seconds / share - seconds if share else 0.0
        line = (
            f"{self.label}: {share:4.0%} of {human_bytes(self.total_bytes)}, "
            f"{human_bytes(self.done_bytes / seconds)}/s, {left:.0f} s left"
        )
        self._stream.write(f"\r{line:<79}{after}" if self._on_terminal else f"{line}{after}")
        self._stream.flush()


def human_bytes(count: float) -> str:
    """A number of bytes in words: 13.5 GB (decimal units, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

"""Tokens per second of an engine: of prompts and of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Speed:
    """What passes have done so far, and how long they took."""

    prefill_tokens: int = 0
    """Tokens read of prompts, and of texts that were read again."""
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    """Tokens of texts, one pass each."""
    decode_seconds: float = 0.0

    def add(self, num_tokens: int, seconds: float, *, decodes: bool) -> None:
        """Count one pass."""
        if decodes:
            self.decode_tokens += num_tokens
            self.decode_seconds += seconds
        else:
            self.prefill_tokens += num_tokens
            self.prefill_seconds += seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        """0 where nothing was read."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Of all requests together; 0 where nothing was decoded."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0

    def summary(self) -> str:
        """One line for people."""
        return (
            f"prefill: {self.prefill_tokens:,} tokens, {self.prefill_tokens_per_second:,.1f} tokens/s; "
            f"decode: {self.decode_tokens:,} tokens, {self.decode_tokens_per_second:,.1f} tokens/s"
        )

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "prefill_tokens": self.prefill_tokens,
            "prefill_seconds": self.prefill_seconds,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens": self.decode_tokens,
            "decode_seconds": self.decode_seconds,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }

"""Bytes and durations in words, and back."""

from __future__ import annotations

import re

_DECIMAL = {"TB": 10**12, "GB": 10**9, "MB": 10**6, "kB": 10**3}
_BINARY = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
_READ = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def duration(seconds: float) -> str:
    """``seconds`` as people say it: ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def amount(value: float, unit: str) -> str:
    """``value`` with its unit; bytes (unit ``B``) in decimal multiples, as disks and files are counted."""
    return _in_multiples(value, _DECIMAL) if unit == "B" else f"{value:,.0f} {unit}".rstrip()


def binary_bytes(value: float) -> str:
    """Bytes in binary multiples, as memory is counted."""
    return _in_multiples(value, _BINARY)


def byte_count(text: str) -> int:
    """The bytes that a person means by ``8G``, ``6GiB`` or ``500MB``. Raises ``ValueError`` for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMG]I?|)B?", text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is not a number of bytes: 8G, 6GiB, 500M")
    return int(float(match[1]) * _READ[match[2]])


def _in_multiples(value: float, multiples: dict[str, int]) -> str:
    for name, multiple in multiples.items():
        if value >= multiple:
            return f"{value / multiple:.1f} {name}"
    return f"{value:.0f} B"

"""What pictures need, asked before work starts."""

from __future__ import annotations

import importlib.util


def require_matplotlib() -> None:
    """Raise ``ValueError`` with the remedy where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("pictures need matplotlib: pip install 'megatron_dmc[plot]'")

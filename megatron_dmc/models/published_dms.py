"""``config.json`` as the code of DMS writes it (NVIDIA/Model-Optimizer, ``experimental/dms``), in our settings.

Such a model keeps the model type of the one that it was trained from, and its adapters have the names that ours have.
What its settings say that we cannot compute is refused; the others concern its own inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dmc.config import ADAPTER, DECISIONS, DMS, NEXT, REVERSE, DMCConfig
from megatron_dmc.ops.borrowed import ADAPTER_SCALE

PREFIX = "dms_"
_DEFAULTS: dict[str, Any] = {
    "dms_window_size": 512,
    "dms_cr": 8,
    "dms_tau": 0.1,
    "dms_initial_alpha_offset": 5.0,
}
"""Settings that become ours, with the values that stand for those left out."""

_FIXED: dict[str, tuple[Any, Any, str]] = {
    "dms_separate_alpha": (True, False, "decisions read from scaled queries are not supported, only those of adapters"),
    "dms_alpha_scale": (ADAPTER_SCALE, ADAPTER_SCALE, "the output of adapters is scaled by this number"),
    "dms_alpha_per": ("head", "head", "every KV head decides for itself"),
    "dms_disable_eviction": (False, False, "nothing would be evicted; import the model that it was trained from"),
}
"""The only value that is supported, the one that stands for a setting left out, and why."""

_OF_ITS_INFERENCE = frozenset(
    PREFIX + name
    for name in ("paged_attention_block_size", "compile_limit", "manual_inference_mode", "chunked_prefill")
) | {"dms_preallocate_for_tokens"}


def is_published(given: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` was written by the code of DMS."""
    return "dms_separate_alpha" in given or "dms_window_size" in given


def plain_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` without what makes it one of DMS, the classes for it among that."""
    if not is_published(given):
        return dict(given)
    ours = _DEFAULTS.keys() | _FIXED.keys() | _OF_ITS_INFERENCE | {"auto_map"}
    return {name: value for name, value in given.items() if name not in ours}


def published_settings(given: Mapping[str, Any]) -> DMCConfig | None:
    """The settings of a model of DMS; None: it is none.

    Its training lets keys be seen for ``dms_window_size`` positions, its inference for one less: we take the former.

    Raises:
        ValueError: a value that is not supported; the message names it.
    """
    if not is_published(given):
        return None
    for name, (supported, absent, reason) in _FIXED.items():
        if given.get(name, absent) != supported:
            raise ValueError(f"config.json: {name}={given.get(name, absent)!r} must be {supported!r}: {reason}")
    found = {name: given.get(name, absent) for name, absent in _DEFAULTS.items()}
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"config.json: {name}={value!r} must be a number")
    return DMCConfig(
        DMS,
        target_cr=float(found["dms_cr"]),
        window_size=int(found["dms_window_size"]),
        decision_source=ADAPTER,
        decided_by=NEXT,
        temperature=float(found["dms_tau"]),
        decision_bias=float(found["dms_initial_alpha_offset"]),
        train=DECISIONS,
        distill=REVERSE,
    )

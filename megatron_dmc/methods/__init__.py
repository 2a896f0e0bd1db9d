"""Methods: how a cache is kept. Each is one page that says what it is and what it is not.

A learned method comes with its model (``method_of``), a policy needs no training and is chosen by name (``POLICIES``).
"""

from __future__ import annotations

from collections.abc import Callable

from megatron_dmc.config import DMCConfig
from megatron_dmc.methods.base import Method
from megatron_dmc.methods.dense import Dense
from megatron_dmc.methods.dmc import DMC
from megatron_dmc.methods.dms import DMS
from megatron_dmc.methods.h2o import H2O
from megatron_dmc.methods.tova import TOVA
from megatron_dmc.models.borrowed_channel import borrowed_by

__all__ = ["DMC", "DMS", "H2O", "POLICIES", "TOVA", "Dense", "Method", "method_of", "policy"]

LEARNED: dict[str, Callable[[DMCConfig], Method]] = {kind.name: kind for kind in (DMC, DMS)}
"""Setting ``method`` -> the method of a model that was retrofitted."""

POLICIES: dict[str, Callable[[int], Method]] = {kind.name: kind for kind in (H2O, TOVA)}
"""Name -> the policy for a budget of entries per head. A new one is one more class here."""


def method_of(settings: DMCConfig | None, neuron_scale: float = 0.0) -> Method:
    """The method that a model was trained with.

    Args:
        settings: of the model; None: it was never retrofitted.
        neuron_scale: of the borrowed channels while ``zero_out`` trains; they have faded at its end.
    """
    if settings is None or not settings.retrofits:
        return Dense()
    if not settings.compresses:
        return Dense(neuron_scale, borrowed_by(settings))
    return LEARNED[settings.method](settings)


def policy(name: str, budget: int) -> Method:
    """The policy ``name`` with ``budget`` entries per head. Raises ``ValueError`` on an unknown name."""
    if name not in POLICIES:
        raise ValueError(f"policy {name!r}: must be one of {', '.join(sorted(POLICIES))}")
    return POLICIES[name](budget)

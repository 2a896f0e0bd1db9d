"""The settings of Dynamic Memory Compression: one frozen dataclass, the source of flags and file formats.

Command-line flags (``training/arguments.py``), checkpoints and exported models all carry exactly these
fields. Sources: [DMC] arXiv 2403.09636; "contract" marks a definition that the paper leaves open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dmc.stages import RETROFIT, STAGES, find_stage

SCHEMA_VERSION = 1
"""Version of the settings as they are stored in checkpoints and exported models."""

DECISIONS_PER = ("head", "layer")

# sigmoid(x) > 0.5 evaluated in bfloat16 is x > 2**-7: the threshold of the published checkpoints.
BF16_DECISION_THRESHOLD = 0.0078125
BF16_IMPORTANCE_EPSILON = 0.0078125


def _setting(default: Any, help: str, *, unit: str = "", source: str, choices: Collection[str] | None = None) -> Any:
    """A field of :class:`DMCConfig`."""
    metadata = {"help": help, "unit": unit, "source": source, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DMCConfig:
    """Settings of DMC. Raises ``ValueError`` on a value outside its range."""

    stage: str = _setting(
        RETROFIT.name,
        "stage of the retrofit; off builds Megatron's own model and nothing of ours",
        source="[DMC] section 3.3",
        choices=STAGES,
    )
    target_cr: float = _setting(
        4.0,
        "compression ratio to reach: cache without / with compression",
        unit="ratio, >= 1",
        source="[DMC] section 3.2",
    )
    window_size: int = _setting(
        0,
        "tokens in the running mean of a segment, the current one counted; 0 = the whole segment",
        unit="tokens, >= 0",
        source="[DMC] section 3.2; 12 in the published checkpoints",
    )
    temperature: float = _setting(
        0.1, "temperature tau of the Gumbel-sigmoid in training", unit="> 0", source="[DMC] eq. 8"
    )
    decision_bias: float = _setting(
        5.0,
        "offset of the decision logit (subtracted) and of the importance logit (added)",
        unit="logits",
        source="[DMC] section 3.1",
    )
    decision_threshold: float = _setting(
        0.0,
        "a decision logit strictly above it accumulates; 0.0078125 in the published bfloat16 checkpoints",
        unit="logits",
        source="contract",
    )
    importance_epsilon: float = _setting(
        1e-6,
        "added to the importance, so that no segment has weight zero",
        unit="> 0",
        source="contract; 0.0078125 in the published checkpoints",
    )
    decisions_per: str = _setting(
        "head",
        "one decision per KV head (DMC) or one per layer (DMC-C)",
        source="[DMC] section 3; definition of DMC-C: contract",
        choices=DECISIONS_PER,
    )
    loss_weight: float = _setting(1.0, "weight of the one-sided compression loss", unit=">= 0", source="[DMC] eq. 11")
    zero_out_fraction: float = _setting(
        0.8,
        "share of the zero_out steps after which the borrowed channels have faded to zero",
        unit="(0, 1]",
        source="code of [DMC]",
    )
    noise_seed: int = _setting(
        1234, "seed of the decision noise, a hash of its coordinates", unit=">= 0", source="contract"
    )
    stop_at_cr: float | None = _setting(
        None,
        "end the retrofit stage early once this compression ratio is measured",
        unit="ratio, >= 1",
        source="contract",
    )

    def __post_init__(self) -> None:
        find_stage(self.stage)
        _require(self.target_cr >= 1, "target_cr", self.target_cr, ">= 1 (1 = no compression)")
        _require(self.window_size >= 0, "window_size", self.window_size, ">= 0 (0 = whole segment)")
        _require(self.temperature > 0, "temperature", self.temperature, "> 0 (published: 0.1)")
        _require(self.importance_epsilon > 0, "importance_epsilon", self.importance_epsilon, "> 0 (ours: 1e-6)")
        _require(
            self.decisions_per in DECISIONS_PER,
            "decisions_per",
            self.decisions_per,
            f"one of {', '.join(DECISIONS_PER)}",
        )
        _require(self.loss_weight >= 0, "loss_weight", self.loss_weight, ">= 0")
        _require(0 < self.zero_out_fraction <= 1, "zero_out_fraction", self.zero_out_fraction, "in (0, 1]")
        _require(self.noise_seed >= 0, "noise_seed", self.noise_seed, ">= 0")
        _require(self.stop_at_cr is None or self.stop_at_cr >= 1, "stop_at_cr", self.stop_at_cr, ">= 1, or unset")

    @property
    def compresses(self) -> bool:
        """Whether the cache of a model in this stage is compressed (decisions are taken)."""
        return find_stage(self.stage).compresses

    @property
    def borrows_channel(self) -> bool:
        """Whether the last channel of query and key heads is borrowed; otherwise the model is Megatron's own."""
        return find_stage(self.stage).borrows_channel

    def to_dict(self) -> dict[str, Any]:
        """All settings and the schema version, ready for JSON."""
        return {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> DMCConfig:
        """Read what :meth:`to_dict` wrote.

        Raises:
            ValueError: unknown or missing schema version, an unknown setting, or a value of the wrong type.
        """
        version = stored.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"DMC settings have schema_version={version!r}: this release reads {SCHEMA_VERSION}; "
                "convert the model again with the release that wrote it, or update megatron_dmc"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {name: value for name, value in stored.items() if name != "schema_version"}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"unknown DMC settings {unknown}: allowed are {sorted(fields)}")
        for name, value in values.items():
            values[name] = _checked(name, value, fields[name].default)
        return cls(**values)


def _require(holds: bool, name: str, given: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"dmc_{name}={given!r}: must be {allowed}")


def _checked(name: str, value: Any, default: Any) -> Any:
    """``value`` with the type of ``default``; an int is accepted for a float, nothing else is converted."""
    if default is None or isinstance(default, float):
        if value is None and default is None:
            return None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif type(value) is type(default):
        return value
    raise ValueError(f"dmc_{name}={value!r}: must be of type {'float' if default is None else type(default).__name__}")

"""The settings of a retrofit: one frozen dataclass, the source of flags and file formats.

Command-line flags (``training/arguments.py``), checkpoints and exported models all carry exactly these
fields. Sources: [DMC] arXiv 2403.09636; [DMS] arXiv 2506.05345; "contract" marks a definition that the papers leave
open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dmc.stages import ADAPTER, DMC, DMS, NEURON, RETROFIT, STAGES, Published, find_stage

SCHEMA_VERSION = 2
"""Version of the settings as they are stored in checkpoints and exported models."""

SINCE_2 = ("method", "decision_source", "decided_by", "steps_per_unit", "train", "distill")
"""Settings that version 1 did not have. It knew one method, and their defaults say what it did."""

METHODS = (DMC, DMS)
DECISION_SOURCES = (NEURON, ADAPTER)
OWN, NEXT = "own", "next"
DECIDED_BY = (OWN, NEXT)
DECISIONS_PER = ("head", "layer")
ALL, DECISIONS = "all", "decisions"
TRAIN = (ALL, DECISIONS)
NONE, FORWARD, REVERSE = "none", "forward", "reverse"
DISTILL = (NONE, FORWARD, REVERSE)

WINDOW_SIZE = {DMC: 0, DMS: 256}
"""What a method's window is where nothing else is said ([DMS] section 3; the released model has 512)."""

# sigmoid(x) > 0.5 evaluated in bfloat16 is x > 2**-7: the threshold of the published checkpoints.
BF16_DECISION_THRESHOLD = 0.0078125
BF16_IMPORTANCE_EPSILON = 0.0078125


def _setting(default: Any, help: str, *, unit: str = "", source: str, choices: Collection[str] | None = None) -> Any:
    """A field of :class:`DMCConfig`."""
    metadata = {"help": help, "unit": unit, "source": source, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DMCConfig:
    """Settings of a retrofit. Raises ``ValueError`` on a value outside its range, and on values that exclude others."""

    method: str = _setting(
        DMC,
        "dmc merges tokens into entries; dms evicts them behind a window",
        source="[DMC], [DMS]",
        choices=METHODS,
    )
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
        -1,
        "dmc: tokens in the running mean of a segment, the current one counted, 0 = the whole segment; dms: positions "
        f"back that a token stays whatever was decided; -1 = {WINDOW_SIZE[DMC]} of dmc, {WINDOW_SIZE[DMS]} of dms",
        unit="tokens, >= 0",
        source="[DMC] section 3.2, 12 in the published checkpoints; [DMS] section 3",
    )
    decision_source: str = _setting(
        NEURON,
        "where decisions come from: a borrowed channel of keys (dmc) or queries (dms), or a linear of the hidden "
        "state (dms)",
        source="[DMC] section 3.1; [DMS] section 3 and its code",
        choices=DECISION_SOURCES,
    )
    decided_by: str = _setting(
        OWN,
        "dms: which token decides whether a token is evicted, itself or the one after it",
        source="[DMS] section 3 (own); its code (next)",
        choices=DECIDED_BY,
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
    steps_per_unit: float | None = _setting(
        None,
        "steps of the retrofit stage in which the ratio asked for rises by 1, until target_cr; unset, the whole stage",
        unit="steps, > 0",
        source="[DMS] section 4: 100",
    )
    train: str = _setting(
        ALL,
        "what learns: all weights, or the adapters that decide and nothing else",
        source="[DMS] (all); its code (decisions)",
        choices=TRAIN,
    )
    distill: str = _setting(
        NONE,
        "learn from the logits of the uncompressed model instead of the text: forward is KL(teacher || student), "
        "reverse KL(student || teacher)",
        source="[DMS] section 3; its code (reverse)",
        choices=DISTILL,
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
        for field in dataclasses.fields(self):
            choices = field.metadata["choices"]
            if field.name != "stage" and choices is not None:
                given = getattr(self, field.name)
                _require(given in choices, field.name, given, f"one of {', '.join(choices)}")
        if self.window_size == -1:
            object.__setattr__(self, "window_size", WINDOW_SIZE[self.method])
        _require(self.target_cr >= 1, "target_cr", self.target_cr, ">= 1 (1 = no compression)")
        _require(self.window_size >= 0, "window_size", self.window_size, ">= 0 (0 = whole segment in dmc)")
        _require(self.temperature > 0, "temperature", self.temperature, "> 0 (published: 0.1)")
        _require(self.importance_epsilon > 0, "importance_epsilon", self.importance_epsilon, "> 0 (ours: 1e-6)")
        _require(self.loss_weight >= 0, "loss_weight", self.loss_weight, ">= 0")
        _require(0 < self.zero_out_fraction <= 1, "zero_out_fraction", self.zero_out_fraction, "in (0, 1]")
        _require(self.noise_seed >= 0, "noise_seed", self.noise_seed, ">= 0")
        _require(self.stop_at_cr is None or self.stop_at_cr >= 1, "stop_at_cr", self.stop_at_cr, ">= 1, or unset")
        _require(
            self.steps_per_unit is None or self.steps_per_unit > 0,
            "steps_per_unit",
            self.steps_per_unit,
            "> 0, or unset",
        )
        self._check_combination()

    def _check_combination(self) -> None:
        if self.method == DMC:
            _require(self.decision_source == NEURON, "decision_source", self.decision_source, "neuron with dmc")
            _require(self.decided_by == OWN, "decided_by", self.decided_by, "own with dmc")
        else:
            if self.decision_source == ADAPTER and find_stage(self.stage).frees_channel:
                _require(False, "stage", self.stage, "retrofit with an adapter, for which no channel has to be freed")
            _require(self.decisions_per == "head", "decisions_per", self.decisions_per, "head with dms")
        if self.train == DECISIONS:
            _require(
                self.decision_source == ADAPTER,
                "train",
                self.train,
                "all with the neuron, whose channel the other weights must learn to do without; use "
                "--dmc-decision-source adapter",
            )

    @property
    def compresses(self) -> bool:
        """Whether the cache of a model in this stage is compressed (decisions are taken)."""
        return find_stage(self.stage).compresses

    @property
    def retrofits(self) -> bool:
        """Whether the stage belongs to the retrofit; otherwise the model is Megatron's own."""
        return find_stage(self.stage).retrofits

    @property
    def borrows_channel(self) -> bool:
        """Whether decisions are read from channels of heads that attention has lent (or is about to lend)."""
        return self.retrofits and self.decision_source == NEURON

    @property
    def published(self) -> Published:
        """How the authors of the method train this stage."""
        return find_stage(self.stage).published.get((self.method, self.decision_source), Published())

    def ramp_steps(self, stage_steps: int) -> float:
        """Steps in which the ratio asked for rises in a stage of ``stage_steps``."""
        if self.steps_per_unit is None:
            return stage_steps
        return max(1.0, self.steps_per_unit * (self.target_cr - 1.0))

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
        if version not in (1, SCHEMA_VERSION):
            raise ValueError(
                f"DMC settings have schema_version={version!r}: this release reads 1 and {SCHEMA_VERSION}; "
                "convert the model again with the release that wrote it, or update megatron_dmc"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {name: value for name, value in stored.items() if name != "schema_version"}
        if version == 1:
            fields = {name: field for name, field in fields.items() if name not in SINCE_2}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"unknown DMC settings {unknown}: allowed are {sorted(fields)}")
        for name, value in values.items():
            values[name] = _checked(name, value, fields[name].default)
        return cls(**values)


def has_adapter(settings: DMCConfig | None) -> bool:
    """Whether a model with these settings has an adapter that decides; None: it was never retrofitted."""
    return settings is not None and settings.retrofits and settings.decision_source == ADAPTER


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

"""The stages of a retrofit ([DMC] section 3.3): each is one object, and nobody else knows a stage by its name.

Published lengths and learning rates: of DMC in [DMC] section 4; of DMS's ramp in [DMS] section 4, its ``zero_out`` and
rate in the recipe of FastDMS; of its adapter in the code of [DMS].

What changes during a stage is a pure function of step, length of the stage and settings. Nothing here has a state: a
resumed run needs only its step. Steps are 0-based: those done before the one that is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

DMC, DMS = "dmc", "dms"
NEURON, ADAPTER = "neuron", "adapter"

ZERO_OUT_STEPS = 250
"""The published length ([DMC] section 4). In far fewer the model cannot learn to do without the channel: five steps
raised the perplexity of SmolLM2-135M from 7.76 to 10.82 (measured with this package)."""


def no_compression(step: int, ramp_steps: float, final_cr: float) -> float:
    """The cache of an uncompressed model."""
    return 1.0


def rising_ratio(step: int, ramp_steps: float, final_cr: float) -> float:
    """A line from 1 that reaches ``final_cr`` in the last step of the ramp and stays there."""
    return 1.0 + (final_cr - 1.0) * min(1.0, (step + 1) / ramp_steps)


def final_ratio(step: int, ramp_steps: float, final_cr: float) -> float:
    """``final_cr`` from the first step on."""
    return final_cr


def whole_neuron(step: int, stage_steps: int, zero_out_fraction: float) -> float:
    """The channel belongs to attention."""
    return 1.0


def fading_neuron(step: int, stage_steps: int, zero_out_fraction: float) -> float:
    """From 1 to 0 within a share of the steps, then 0 for the rest (code of [DMC])."""
    return max(0.0, 1.0 - step / (zero_out_fraction * stage_steps))


def no_neuron(step: int, stage_steps: int, zero_out_fraction: float) -> float:
    """The channel carries decisions and importance alone."""
    return 0.0


def of_any_ratio(steps: int) -> Callable[[float], int]:
    """A length that is the same for every ratio."""
    return lambda final_cr: steps


def per_unit(steps: int) -> Callable[[float], int]:
    """A length of ``steps`` per unit of the ratio above 1."""
    return lambda final_cr: round(steps * (final_cr - 1.0))


def accumulate_fraction(compression_ratio: float) -> float:
    """Share of tokens merged into an entry at a compression ratio >= 1 ([DMC] section 3.2)."""
    return 1.0 - 1.0 / compression_ratio


@dataclass(frozen=True)
class LearningRate:
    """From ``first`` to ``last`` over a stage; ``decay`` is Megatron's ``--lr-decay-style``."""

    first: float
    last: float
    decay: str = "constant"

    def flags(self) -> dict[str, str]:
        """Megatron's flags."""
        rate = {"--lr": str(self.first), "--lr-decay-style": self.decay}
        return rate if self.last == self.first else rate | {"--min-lr": str(self.last)}


@dataclass(frozen=True)
class Published:
    """How a method's authors train a stage.

    Attributes:
        steps: final ratio -> length; None where none is published.
        learning_rate: None leaves it to Megatron's flags.
        harmless_steps: fewer are known to harm the model; 0 where none are.
    """

    steps: Callable[[float], int] | None = None
    learning_rate: LearningRate | None = None
    harmless_steps: int = 0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: of the flag ``--dmc-stage``, in checkpoints and in directories.
        follows: names of the stages whose checkpoint it may start from.
        retrofits: it is part of a retrofit; without it the stage builds Megatron's own model and nothing of ours.
        compresses: decisions are taken and the cache shrinks.
        raises_target: the ratio asked for rises during the stage, which may therefore end early at a ratio.
        target_cr: (step, steps in which the ratio rises, final ratio) -> compression ratio that the loss asks for.
        neuron_scale: (step, length of the stage, ``zero_out_fraction``) -> factor of the borrowed channels.
        published: (method, source of its decisions) -> how its authors train the stage.
    """

    name: str
    follows: tuple[str, ...]
    retrofits: bool = True
    compresses: bool = False
    raises_target: bool = False
    target_cr: Callable[[int, int, float], float] = no_compression
    neuron_scale: Callable[[int, int, float], float] = no_neuron
    published: Mapping[tuple[str, str], Published] = field(default_factory=dict, hash=False)

    @property
    def frees_channel(self) -> bool:
        """Whether it prepares a channel for decisions, which none needs that borrows nothing."""
        return self.retrofits and not self.compresses

    def starts_from(self, borrows_channel: bool = True) -> tuple[str, ...]:
        """``follows``, where nothing is borrowed without the stages that free a channel."""
        if borrows_channel:
            return self.follows
        before = [find_stage(name) for name in self.follows]
        return tuple(name for stage in before for name in (stage.follows if stage.frees_channel else (stage.name,)))

    def check_base(self, base: Stage, path: str, borrows_channel: bool = True) -> None:
        """Raise ``ValueError`` when this stage cannot start from ``path``, a checkpoint of ``base``."""
        allowed = self.starts_from(borrows_channel)
        if base.name not in allowed:
            raise ValueError(
                f"--dmc-stage {self.name} was started from {path}, a checkpoint of stage {base.name}: it starts from "
                f"{' or '.join(allowed)}; run the stages in the order {', '.join(retrofit_order(borrows_channel))}"
            )

    def clears_rows(self, base: Stage) -> bool:
        """Whether starting from ``base`` must first zero the rows of the borrowed channels: decisions begin here."""
        return self.compresses and base.frees_channel


OFF = Stage("off", follows=("off",), retrofits=False, neuron_scale=whole_neuron)
"""Megatron's own model: a plain Llama, and the control."""
ZERO_OUT = Stage(
    "zero_out",
    follows=("off",),
    neuron_scale=fading_neuron,
    published={
        (DMC, NEURON): Published(of_any_ratio(ZERO_OUT_STEPS), LearningRate(3e-5, 3e-5), ZERO_OUT_STEPS),
        (DMS, NEURON): Published(of_any_ratio(2000), LearningRate(1e-5, 1e-5)),
    },
)
RETROFIT = Stage(
    "retrofit",
    follows=("zero_out",),
    compresses=True,
    raises_target=True,
    target_cr=rising_ratio,
    published={
        (DMC, NEURON): Published(per_unit(6000), LearningRate(3e-5, 3e-5)),
        (DMS, NEURON): Published(per_unit(100), LearningRate(1e-5, 1e-5)),
        (DMS, ADAPTER): Published(per_unit(34), LearningRate(3e-5, 3e-5)),
    },
)
CONSOLIDATE = Stage(
    "consolidate",
    follows=("retrofit",),
    compresses=True,
    target_cr=final_ratio,
    published={(DMC, NEURON): Published(of_any_ratio(2000), LearningRate(3e-5, 3e-6, "cosine"))},
)

STAGES: dict[str, Stage] = {}
"""All stages by name, in the order in which they follow one another."""


def register(stage: Stage) -> None:
    """Make a stage known to flags, checks and recipes."""
    assert stage.name not in STAGES
    STAGES[stage.name] = stage


for _stage in (OFF, ZERO_OUT, RETROFIT, CONSOLIDATE):
    register(_stage)


def find_stage(name: str) -> Stage:
    """The stage of a name. Raises ``ValueError`` for one that is not known."""
    if name not in STAGES:
        raise ValueError(f"dmc_stage={name!r}: must be one of {', '.join(STAGES)}")
    return STAGES[name]


def retrofit_order(borrows_channel: bool = True) -> tuple[str, ...]:
    """Names of the stages that turn a plain Llama into a compressed one, in their order."""
    return tuple(
        name for name, stage in STAGES.items() if stage.retrofits and (borrows_channel or not stage.frees_channel)
    )

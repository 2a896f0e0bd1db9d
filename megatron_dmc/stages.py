"""The stages of a retrofit: what each may start from."""

from __future__ import annotations

PREDECESSORS: dict[str, tuple[str, ...]] = {
    "off": ("off",),
    "zero_out": ("off",),
    "retrofit": ("zero_out",),
    "consolidate": ("retrofit",),
}
"""Stage -> stages whose checkpoint it may start from; a plain Llama counts as ``off``."""


def check_start(stage: str, base_stage: str, base_path: str) -> None:
    """Raise ``ValueError`` when ``stage`` cannot start from a checkpoint of ``base_stage`` ([DMC] section 3.3)."""
    allowed = PREDECESSORS[stage]
    if base_stage not in allowed:
        raise ValueError(
            f"--dmc-stage {stage} was started from {base_path}, a checkpoint of stage {base_stage}: it starts from "
            f"{' or '.join(allowed)}; run the stages in the order zero_out, retrofit, consolidate"
        )


def clears_borrowed_rows(stage: str, base_stage: str) -> bool:
    """Whether starting ``stage`` from ``base_stage`` must first zero the rows of the borrowed channels."""
    return stage == "retrofit" and base_stage == "zero_out"

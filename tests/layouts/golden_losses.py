"""Losses of a 2-layer model through all three stages: 50 steps on one rank at learning rate 3e-5.

``tests/golden/losses.txt`` holds them, so that a change which should not touch the maths shows when it does. After
one that should, with the pinned versions: ``python -m tests.layouts.golden_losses``, and say why in the commit.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.layouts.laboratory import Laboratory, Variant

LOSSES = Path(__file__).parents[1] / "golden" / "losses.txt"

STAGES = {"zero_out": 15, "retrofit": 25, "consolidate": 10}
"""Steps of each."""

_MODEL = (("num_layers", 2),)
_HEADER = "stage step lm_loss compression_loss"


def measure(laboratory: Laboratory, directory: Path) -> list[tuple[str, int, float, float]]:
    """Run the stages; per step: stage, number, LM loss, compression loss (0 in ``zero_out``).

    Args:
        laboratory: holds the data and the untrained model.
        directory: receives the checkpoints of the stages.
    """
    rows = []
    base = laboratory.base(Variant(model=_MODEL, stage="zero_out"))
    for stage, steps in STAGES.items():
        variant = Variant(model=_MODEL, stage=stage)
        save = directory / stage
        flags = {"train_iters": steps, "pretrained_checkpoint": base, "save": save, "dmc_total_samples": 400}
        run = laboratory.train(variant, 1, **flags)
        for step, values in enumerate(run.steps, start=1):
            rows.append((stage, step, values["lm loss"], values.get("compression loss", 0.0)))
        base = save
    return rows


def read() -> list[tuple[str, int, float, float]]:
    """The recorded rows."""
    rows = [line.split() for line in LOSSES.read_text(encoding="utf-8").splitlines()[1:]]
    return [(stage, int(step), float(lm_loss), float(compression)) for stage, step, lm_loss, compression in rows]


def main() -> None:
    """Measure and record."""
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Laboratory(Path(directory)), Path(directory) / "stages")
    lines = [f"{stage} {step} {lm_loss:.6f} {compression:.6f}" for stage, step, lm_loss, compression in rows]
    LOSSES.write_text("\n".join([_HEADER, *lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

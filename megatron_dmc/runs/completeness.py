"""Whether a stage has run to its end: recorded where training ends, read by whatever follows it.

``python -m megatron_dmc.runs.completeness DIRECTORY`` tells a shell script: exit code 0 where the stage is finished,
75 where it was interrupted and the same command continues it, 1 where no training has ended there.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import NoneType

from megatron_dmc.runs.layout import OUTCOME_FILE
from megatron_dmc.support.errors import EXIT_DONE, EXIT_UNFINISHED, EXIT_USER_ERROR
from megatron_dmc.support.files import read_json, write_json


class Status(StrEnum):
    """How the training of a stage ended. ``RUNNING``: not yet, or it was killed."""

    COMPLETE = "complete"
    RATIO_REACHED = "ratio_reached"
    INTERRUPTED = "interrupted"
    RUNNING = "running"


@dataclass(frozen=True)
class Outcome:
    """How the training of a stage ended.

    Attributes:
        iteration: of its newest checkpoint.
        train_iters: steps that were asked for.
        status: whether they were done.
        stop_at_cr: ratio that ended the stage early, where one did.
    """

    iteration: int
    train_iters: int
    status: Status
    stop_at_cr: float | None = None

    @property
    def finished(self) -> bool:
        """Whether another stage may start from here."""
        return self.status in (Status.COMPLETE, Status.RATIO_REACHED)

    @property
    def exit_code(self) -> int:
        """0 when finished, 75 when the same command continues."""
        return EXIT_DONE if self.finished else EXIT_UNFINISHED

    def __str__(self) -> str:
        if self.status is Status.COMPLETE:
            return f"finished at iteration {self.iteration}"
        if self.status is Status.RATIO_REACHED:
            return f"finished at iteration {self.iteration}: a compression ratio of {self.stop_at_cr:g} is reached"
        return f"{self.status} at iteration {self.iteration} of {self.train_iters}"


def write_outcome(directory: str | Path, outcome: Outcome) -> None:
    """Record how the training in ``directory`` ended."""
    write_json(Path(directory, OUTCOME_FILE), dataclasses.asdict(outcome))


def read_outcome(directory: str | Path) -> Outcome | None:
    """How the last training in ``directory`` ended; None where none has begun, or an earlier release has trained.

    Raises:
        ValueError: the record is not one of ours.
    """
    path = Path(directory, OUTCOME_FILE)
    if not path.is_file():
        return None
    stored = read_json(path)
    kinds = {"iteration": (int,), "train_iters": (int,), "status": (str,), "stop_at_cr": (float, NoneType)}
    if stored.keys() != kinds.keys() or any(type(stored[name]) not in allowed for name, allowed in kinds.items()):
        raise ValueError(f"{path} does not say how a training ended: remove it, and give the stage's command again")
    return Outcome(**{**stored, "status": Status(stored["status"])})


def outcome_of(directory: str | Path, iteration: int, train_iters: int | None) -> Outcome:
    """The outcome that belongs to the newest checkpoint of a stage.

    A checkpoint without a record of its own (its run was killed, or an earlier release wrote it) is judged by the
    length that was asked for when it was saved.

    Args:
        directory: of the stage.
        iteration: of its newest checkpoint.
        train_iters: length of the stage among the arguments saved in it; None where they do not state it.
    """
    recorded = read_outcome(directory)
    if recorded is not None and recorded.iteration == iteration:
        return recorded
    done = train_iters is not None and iteration >= train_iters
    return Outcome(iteration, train_iters or 0, Status.COMPLETE if done else Status.INTERRUPTED)


def main(directory: str) -> int:
    """Print where a stage stands; the exit code for scripts."""
    outcome = read_outcome(directory)
    print(f"{directory}: {outcome or 'no training has ended here'}", file=sys.stderr)
    if outcome is None or outcome.status is Status.RUNNING:
        return EXIT_USER_ERROR
    return outcome.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

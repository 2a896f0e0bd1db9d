"""Cost of DMC in training, beside stock attention: ``python -m examples.benchmarks.training --json OUT``.

Rows come from suites, functions from the options to rows; ``SUITES`` lists them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator

from examples.benchmarks import training_attention
from examples.benchmarks.measure import Row, add_output_argument, last_line_of_new_process, report

STEP_LENGTHS = (1024, 4096)
STEP_GOAL_FROM_LENGTH, STEP_GOAL = 4096, 1.2


def step_rows(options: argparse.Namespace) -> Iterator[Row]:
    """A whole training step of a stack of layers with DMC, against the same without."""
    for length in STEP_LENGTHS:
        if length <= options.max_length:
            arguments = ["--sequence-length", str(length)]
            found = json.loads(last_line_of_new_process("examples.benchmarks.training_step", arguments))
            seconds, ratio = found.pop("seconds"), found.pop("ratio")
            for stage, median in seconds.items():
                yield Row(f"training step, stage {stage}: time", 1000 * median, "ms", found)
            goal = STEP_GOAL if length >= STEP_GOAL_FROM_LENGTH else None
            yield Row("training step, with DMC / without: time", ratio, "ratio", found, goal)


SUITES: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "attention": training_attention.attention_rows,
    "pooling": training_attention.pooling_rows,
    "step": step_rows,
}


def main() -> int:
    """Run the chosen suites."""
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.training", description=__doc__.split(":")[0])
    add_output_argument(parser)
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated choice of %(default)s")
    parser.add_argument("--max-length", type=int, default=8192, help="longest sequence (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns of each pair (default: %(default)s)")
    options = parser.parse_args()
    names = options.suites.split(",")
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        parser.error(f"--suites {','.join(unknown)}: known are {','.join(SUITES)}")
    report((row for name in names for row in SUITES[name](options)), options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())

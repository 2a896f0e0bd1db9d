"""A run of one stage from a checkpoint, in a process of its own: ``python -m tests.checkpoint.victim BASE SAVE FLAGS``.

A file ``other`` in the base takes the place of its metadata between the look and the load.
"""

import shlex
import sys
from pathlib import Path

from megatron_dmc import cli
from megatron_dmc.training import pretrain
from tests.checkpoint.five_ways import swap

FLAGS = shlex.split(
    "--dmc-stage zero_out --mock-data --seq-length 64 --micro-batch-size 1 --global-batch-size 1 --train-iters 1 "
    "--log-interval 1 --eval-iters 0 --save-interval 1"
)


def main() -> int:
    """Train; the exit code is the program's."""
    base, save, *more = sys.argv[1:]
    find_start = pretrain.find_start

    def find_and_swap(*arguments, **keywords):
        start = find_start(*arguments, **keywords)
        if Path(base, "other").exists():
            swap(Path(base))
        return start

    pretrain.find_start = find_and_swap
    return cli.main(["train", *FLAGS, "--pretrained-checkpoint", base, "--save", save, *more])


if __name__ == "__main__":
    sys.exit(main())

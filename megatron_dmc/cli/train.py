"""``megatron-dmc train``: one stage, with Megatron's flags and ours; what torchrun or srun starts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

CONTINUES = ", which is saved: the same command continues"
LOST = ", which is lost: only with --save a run continues"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command. Everything after its name goes to Megatron, unparsed here."""
    parser = subparsers.add_parser(
        "train",
        help="one stage of a retrofit: Megatron's flags and --dmc-*",
        add_help=False,
        prefix_chars="\0",
    )
    parser.add_argument("megatron_flags", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train; the exit code is judged by what was written: 75 where the stage was interrupted and can continue.

    16 and 17 stay those of Megatron's rerun machine.
    """
    if {"--help", "-h"} & set(args.megatron_flags):
        _print_help()
        return 0
    from megatron_dmc.training.pretrain import train

    outcome = train(args.megatron_flags)
    if int(os.environ["RANK"]) == 0:
        remedy = CONTINUES if _saves(args.megatron_flags) else LOST
        print(f"stage {outcome}{'' if outcome.finished else remedy}", flush=True)
    return outcome.exit_code


def _saves(flags: Sequence[str]) -> bool:
    return any(flag.split("=", 1)[0] == "--save" for flag in flags)


def _print_help() -> None:
    from megatron_dmc.training.arguments import add_dmc_arguments

    parser = argparse.ArgumentParser(
        prog="megatron-dmc train",
        description="Runs or continues one stage. Takes every flag of Megatron's pretraining (such as "
        "--tensor-model-parallel-size, --micro-batch-size, --train-iters, --lr) and those below. The shape of the "
        "model comes from --pretrained-checkpoint; a run continues when --save holds its checkpoint. --train-iters "
        "must be given; what else every run needs has usual values, which are printed.",
        allow_abbrev=False,
    )
    parser.add_argument("--pretrained-checkpoint", metavar="DIR", help="weights to start from, imported or of a stage")
    parser.add_argument("--save", metavar="DIR", help="checkpoints of this stage, metrics.jsonl, outcome.json")
    add_dmc_arguments(parser).print_help()

"""``megatron-dmc doctor``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command ``doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="versions, security floors, impostor packages, GPU, disk: what is wrong and the remedy",
        description="Looks at this machine. Exit code 2: something must be repaired.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the machine and print what was found."""
    from megatron_dmc.seam.doctor import examine
    from megatron_dmc.support.findings import show

    return show(examine(Path.cwd()), as_json=args.json)

"""``megatron-dmc report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command ``report``."""
    parser = subparsers.add_parser(
        "report",
        help="pictures and tables of one or several runs, also while they run",
        description="Writes report.md, report.json and PNG pictures of what training and measuring have left so far. "
        "Of files with what evaluate --json and eval --json printed it writes quality.md, quality.json and pictures of "
        "quality over compression ratio: one line for every name.",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="output directory of a run, or of one stage; or result files"
    )
    parser.add_argument("--output", type=Path, help="directory for the report (default: RUN/report, for a single run)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the report and say where it is."""
    files = [path for path in args.runs if path.is_file()]
    if args.output is None and (files or len(args.runs) > 1):
        raise ValueError("a report on several runs or on result files: give its directory with --output")
    if files:
        if len(files) < len(args.runs):
            raise ValueError("directories of runs and result files: report on either, each with its own --output")
        from megatron_dmc.report.write_quality import write_quality

        print(write_quality(files, args.output))
        return 0
    from megatron_dmc.report.write import write_report

    output = args.output or args.runs[0] / "report"
    write_report(args.runs, output)
    print(output / "report.md")
    return 0

"""Decoding on one GPU, within one lease: ``python -m examples.benchmarks.decode_gpu --json OUT``.

First the kernels are compared with torch operations on the same device; where one is wrong nothing is measured. Then
suites share the time of the lease, each with its most telling rows first. What was measured is written after every row.
``--check-only --device cpu`` checks a few of the smallest shapes in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

from examples.benchmarks.decode_gpu_attention import attention_rows, quantised_rows, tuning_rows
from examples.benchmarks.decode_gpu_check import check_rows
from examples.benchmarks.decode_gpu_step import step_rows
from examples.benchmarks.gpu_caches import Deadline, copy_bandwidth
from examples.benchmarks.measure import Row, add_output_argument, report

SUITES = {"attention": attention_rows, "step": step_rows, "quantised": quantised_rows, "tuning": tuning_rows}
CHECK_FAILED = 2


def main() -> int:
    """Check, then measure."""
    options = _parse()
    if options.device == "cpu":
        # Triton, which nothing has imported yet, chooses then.
        os.environ["TRITON_INTERPRET"] = "1"
    failed: list[Row] = []
    report(_rows(options, failed), options.json)
    for row in failed:
        print(f"{row.name}: {row.value:.3g}, allowed {row.goal:g}: nothing was measured", file=sys.stderr)
    return CHECK_FAILED if failed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.benchmarks.decode_gpu", description=__doc__.split(":")[0])
    add_output_argument(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: interpreter, checks alone")
    parser.add_argument("--check-only", action="store_true", help="measure nothing")
    parser.add_argument("--no-check", action="store_true", help="measure at once, after a run that checked")
    parser.add_argument("--suites", default=",".join(SUITES), help="comma-separated choice of %(default)s")
    parser.add_argument("--minutes", type=float, default=22.0, help="after the checks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=20, help="timed turns, medians count (default: %(default)s)")
    parser.add_argument("--synthetic-cr", type=float, default=8.0, help="of whole steps (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=1.0, help="spread of their lengths (default: %(default)s)")
    options = parser.parse_args()
    options.suites = options.suites.split(",")
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"--suites {','.join(unknown)}: known are {','.join(SUITES)}")
    if options.device == "cpu" and not options.check_only:
        parser.error("--device cpu has nothing to measure: add --check-only")
    return options


def _rows(options: argparse.Namespace, failed: list[Row]) -> Iterator[Row]:
    for row in () if options.no_check else check_rows(options.device):
        yield row
        if not row.met:
            failed.append(row)
    if failed or options.check_only:
        return
    bandwidth = copy_bandwidth(options.device)
    yield Row("copy: bandwidth, read and written", bandwidth / 1e9, "GB/s", {"bytes": 4 << 30})
    lease = Deadline(options.minutes)
    for index, name in enumerate(options.suites):
        yield from SUITES[name](options, bandwidth, lease.share(len(options.suites) - index))


if __name__ == "__main__":
    sys.exit(main())

"""What a check found: shown as a table or as JSON, with a remedy where something is wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_dmc.support.errors import EXIT_CHECK_FAILED, EXIT_DONE

Status = Literal["ok", "warning", "failed"]
STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``remedy`` says what to do where ``status`` is not ok."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def show(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Print the findings to stdout and return the exit code: 2 if any failed."""
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _print_table(findings)
    return EXIT_CHECK_FAILED if any(finding.status == "failed" for finding in findings) else EXIT_DONE


def _print_table(findings: Sequence[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "looked at", "found", box=None, pad_edge=False)
    for finding in findings:
        detail = finding.detail if not finding.remedy else f"{finding.detail}: {finding.remedy}"
        table.add_row(Text(finding.status, style=STYLES[finding.status]), Text(finding.name), Text(detail))
    Console().print(table)

"""How much memory this process may still take."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the line of ``memory.stat`` with what the kernel gives back: control groups of versions 2 and 1."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that the machine has free and that every control group around this process still allows.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    import psutil

    allowed = [left for folder in _groups(root) for left in _left(folder)]
    return max(0, min([psutil.virtual_memory().available, *allowed]))


def _groups(root: Path) -> Iterator[Path]:
    """Folders of the memory groups of this process, up to the outermost.

    In a container the path of a group may be that of its host: then the folders above it are looked at alone.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = top / path.strip("/")
        yield from (one for one in (folder, *folder.parents) if one.is_relative_to(top))


def _left(folder: Path) -> Iterator[int]:
    """What a group allows beside what it holds; nothing where it sets no limit."""
    for limit, use, reclaimable in GROUP_FILES:
        try:
            allowed = int((folder / limit).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            yield allowed - int((folder / use).read_text()) + int(stat.get(reclaimable, 0))
        except (OSError, ValueError):
            continue  # no such file, or "max"

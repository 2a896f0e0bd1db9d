"""Progress with the time left: a bar on a terminal, plain lines now and then anywhere else. Both go to stderr."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator

from megatron_dmc.support.units import amount, duration

SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[float], None]


def position(done: float, total: float | None, unit: str) -> str:
    """How far: ``12 of 80 steps``, or the amount alone where the whole is not known."""
    if not total:
        return amount(done, unit)
    return f"{amount(done, unit if unit == 'B' else '')} of {amount(total, unit)}"


@contextlib.contextmanager
def progress(description: str, total: float | None, unit: str = "", *, done: float = 0.0) -> Iterator[Advance]:
    """Show how far a piece of work is. Yields ``advance(amount)``, to be called as the work goes on, by any thread.

    Args:
        description: what is being done.
        total: the whole amount, None where it is not known.
        unit: of the amounts: ``steps``, ``documents``, or ``B`` for bytes.
        done: the amount that an earlier run did.
    """
    # Conversion needs few packages: without rich a terminal gets the plain lines.
    show = _bar if sys.stderr.isatty() and importlib.util.find_spec("rich") else _lines
    lock = threading.Lock()
    with show(description, total, unit, done) as advance:

        def advance_alone(step: float) -> None:
            with lock:
                advance(step)

        yield advance_alone


@contextlib.contextmanager
def _lines(description: str, total: float | None, unit: str, done: float) -> Iterator[Advance]:
    start = last_line = time.monotonic()
    before = done

    def advance(step: float) -> None:
        nonlocal done, last_line
        done += step
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            print(_line(description, (before, done), total, unit, now - start), file=sys.stderr, flush=True)

    yield advance
    elapsed = time.monotonic() - start
    finished = f"{description}: {amount(done - before, unit)} in {duration(elapsed)}"
    print(finished + _speed(done - before, unit, elapsed), file=sys.stderr, flush=True)


def _line(description: str, span: tuple[float, float], total: float | None, unit: str, elapsed: float) -> str:
    before, done = span
    now = done - before
    if not total:
        return f"{description}: {amount(done, unit)}, {amount(now / elapsed, unit)}/s"
    left = duration(elapsed / now * max(0.0, total - done)) if now else "unknown time"
    return f"{description}: {done / total:.0%} ({position(done, total, unit)}){_speed(now, unit, elapsed)}, {left} left"


def _speed(now: float, unit: str, elapsed: float) -> str:
    """Bytes per second, which tell whether a disk is the limit; other units have the time left alone."""
    return f", {amount(now / elapsed, unit)}/s" if unit == "B" and elapsed else ""


@contextlib.contextmanager
def _bar(description: str, total: float | None, unit: str, done: float) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[position]}{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=int(done), position="", speed="")
        start = time.monotonic()

        def advance(step: float) -> None:
            bar.advance(task, step)
            completed = bar.tasks[task].completed
            speed = _speed(completed - done, unit, time.monotonic() - start)
            bar.update(task, position=position(completed, total, unit), speed=speed)

        yield advance

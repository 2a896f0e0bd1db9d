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
SECONDS_TO_JUDGE = 20.0
SHARE_TO_JUDGE = 0.02
SECONDS_OF_SLOW_WORK = 300.0

Advance = Callable[[float], None]
Note = Callable[[], str]


def position(done: float, total: float | None, unit: str) -> str:
    """How far: ``step 12 of 80``, ``12 of 80 tokens``, or the amount alone where the whole is not known."""
    if not total:
        return amount(done, unit)
    if unit == "steps":
        return f"step {amount(done, '')} of {amount(total, '')}"
    return f"{amount(done, unit if unit == 'B' else '')} of {amount(total, unit)}"


@contextlib.contextmanager
def progress(
    description: str, total: float | None, unit: str = "", *, done: float = 0.0, note: Note = str
) -> Iterator[Advance]:
    """Show how far a piece of work is. Yields ``advance(amount)``, to be called as the work goes on, by any thread.

    Args:
        description: what is being done.
        total: the whole amount, None where it is not known.
        unit: of the amounts: ``steps``, ``documents``, or ``B`` for bytes.
        done: the amount that an earlier run did.
        note: what has been found so far, in a few words; empty where nothing was.
    """
    # Conversion needs few packages: without rich a terminal gets the plain lines.
    show = _bar if sys.stderr.isatty() and importlib.util.find_spec("rich") else _lines
    lock = threading.Lock()
    with show(description, _Work(total, unit, done), note) as advance:

        def advance_alone(step: float) -> None:
            with lock:
                advance(step)

        yield advance_alone


class _Work:
    """How far a piece of work is, and how long the rest takes once that can be told.

    Its speed is measured from the first advance on: the start of a process says nothing about its work.
    """

    def __init__(self, total: float | None, unit: str, done: float) -> None:
        self.total, self.unit, self.done = total, unit, done
        self.before = done
        self.start = time.monotonic()
        self._first: tuple[float, float] | None = None

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start

    def advance(self, step: float) -> None:
        self.done += step
        if self._first is None and step:
            self._first = (time.monotonic(), self.done)

    def speed(self) -> str:
        """Bytes per second, which tell whether a disk is the limit; other units have the time left alone."""
        now = self.done - self.before
        return f", {amount(now / self.elapsed, self.unit)}/s" if self.unit == "B" and self.elapsed else ""

    def left(self) -> str:
        """The time left; empty as long as an estimate would say little."""
        if not self.total or self._first is None:
            return ""
        seconds, measured = time.monotonic() - self._first[0], self.done - self._first[1]
        rest = max(0.0, self.total - self.done)
        early = seconds < SECONDS_TO_JUDGE or measured < SHARE_TO_JUDGE * (measured + rest)
        if not measured or (early and seconds < SECONDS_OF_SLOW_WORK):
            return ""
        return f", {duration(seconds / measured * rest)} left"


@contextlib.contextmanager
def _lines(description: str, work: _Work, note: Note) -> Iterator[Advance]:
    last_line = work.start

    def advance(step: float) -> None:
        nonlocal last_line
        work.advance(step)
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            print(f"{description}: {_line(work)}{_noted(note)}", file=sys.stderr, flush=True)

    yield advance
    finished = f"{description}: {amount(work.done - work.before, work.unit)} in {duration(work.elapsed)}"
    print(f"{finished}{work.speed()}{_noted(note)}", file=sys.stderr, flush=True)


def _line(work: _Work) -> str:
    where = position(work.done, work.total, work.unit)
    if not work.total:
        return f"{where}, {amount((work.done - work.before) / work.elapsed, work.unit)}/s"
    return f"{where} ({work.done / work.total:.0%}){work.speed()}{work.left()}"


def _noted(note: Note) -> str:
    return f", {found}" if (found := note()) else ""


@contextlib.contextmanager
def _bar(description: str, work: _Work, note: Note) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=work.total, completed=int(work.done), state="")

        def advance(step: float) -> None:
            work.advance(step)
            where = position(work.done, work.total, work.unit)
            bar.update(task, completed=work.done, state=f"{where}{work.speed()}{work.left()}{_noted(note)}")

        yield advance

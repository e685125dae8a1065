"""How far a command has come: a bar on a terminal, a line every half minute in a log file, nothing if it is quiet.

One mechanism for all commands that take time. No torch here.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dig.memory import in_bytes
from dig.messages import one_line

T = TypeVar("T")

SECONDS = 30.0
"""Between two lines, and the time that a rate is of."""
FIRST_UPDATES, FIRST_SECONDS = 5, 5.0
"""The first line comes after so many updates, or once so much time has passed."""


def open_console(*, quiet: bool = False) -> Console:
    """The console for people, on stderr; warnings of the library go there too, also where ``quiet`` shows no notes.

    It shows every text as it is: in rich's markup, a folder called ``[red]`` would be a colour.
    """
    console = _console()
    logging.basicConfig(level=logging.WARNING, handlers=[_Teller(console)])
    return _console(quiet=True) if quiet else console


class _Teller(logging.Handler):
    """Says warnings of the library as commands say theirs, one line each; above a bar where there is one."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._print = console.print

    def emit(self, record: logging.LogRecord) -> None:
        self._print(f"{record.levelname.lower()}: {one_line(record.getMessage())}")


def _console(*, quiet: bool = False) -> Console:
    return Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False, quiet=quiet)


def progress_bar(console: Console, *columns: str) -> Progress:
    """A bar with what is done, how long it took and what is left; ``columns`` are more texts, as rich writes them."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(text, markup=False) for text in columns),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def is_watched(console: Console) -> bool:
    """Whether somebody looks at a terminal that can draw over itself; colours that are forced make no file one."""
    return console.is_interactive and console.file.isatty()


class Follower:
    """Told how far something is; says it to whoever is there.

    Args:
        show: Takes what is done, what there is in all (None: unknown) and the figures, at every update.
        say: Takes a line, when one is due; None where a bar shows the same.
        what: What is being done: ``training into run``.
        total: Units in all; None while that isn't known.
        done: Of them before.
        unit: What is counted: ``step``.
        images: To a unit, for the rate; 0 where there are none, and no rate.
        memory: Gives the bytes that are taken at most so far.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        *,
        show: Callable[[int, int | None, str], object] | None,
        say: Callable[[str], object] | None,
        what: str,
        total: int | None,
        done: int = 0,
        unit: str = "step",
        images: int = 1,
        memory: Callable[[], int | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show, self._say = show, say
        self._what, self._unit, self._images = what, unit, images
        self._total, self._done = total, done
        self._memory, self._clock = memory, clock
        self._marks: deque[tuple[float, int]] = deque()
        self._first: tuple[float, int] | None = None
        self._began, self._said, self._updates = clock(), -float("inf"), 0

    def update(self, done: int, *, total: int | None = None, figures: str = "") -> None:
        """Say that so many units are done; ``figures`` are more to show, ``loss 0.1234``."""
        now = self._clock()
        self._done, self._total = done, self._total if total is None else total
        self._updates += 1
        if self._first is None:
            # Not the beginning: the first unit compiles kernels, captures a graph, starts processes.
            self._first = (now, done)
        if not self._marks or now - self._marks[-1][0] >= 1:
            self._marks.append((now, done))
            while len(self._marks) > 2 and now - self._marks[1][0] > SECONDS:
                self._marks.popleft()
        if self._show is not None:
            self._show(done, self._total, ", ".join(part for part in (figures, self._rate(now)) if part))
        started = self._updates >= FIRST_UPDATES or now - self._began >= FIRST_SECONDS
        due = started and now - self._said >= SECONDS
        if self._say is not None and due:
            self._said = now
            self._say(self._line(now, figures))

    def advance(self, units: int = 1) -> None:
        """`update` by so many more."""
        self.update(self._done + units)

    def counting(self, batches: Iterable[T], size: Callable[[T], int]) -> Iterator[T]:
        """The same batches; each counts as done when the next one is asked for."""
        for batch in batches:
            yield batch
            self.advance(size(batch))

    def _rate(self, now: float) -> str:
        """``812 images/s``, of the last half minute; nothing before there is any."""
        since, before = self._marks[0]
        if not self._images or now <= since or self._done <= before:
            return ""
        return f"{number((self._done - before) * self._images / (now - since))} images/s"

    def _left(self, now: float) -> str:
        if self._first is None or self._total is None or now <= self._first[0] or self._done <= self._first[1]:
            return ""
        seconds = (self._total - self._done) * (now - self._first[0]) / (self._done - self._first[1])
        return f"{duration(seconds)} left"

    def _line(self, now: float, figures: str) -> str:
        of = f" of {self._total:,}" if self._total is not None else ""
        taken = self._memory()
        memory = in_bytes(taken) if taken is not None else ""
        parts = [f"{self._unit} {self._done:,}{of}", figures, self._rate(now), self._left(now), memory]
        return one_line(f"{self._what}: {', '.join(part for part in parts if part)}")


@contextmanager
def following(
    console: Console,
    what: str,
    *,
    total: int | None,
    done: int = 0,
    unit: str = "step",
    images: int = 1,
    memory: Callable[[], int | None] = lambda: None,
) -> Iterator[Follower]:
    """A `Follower` for a console: a bar on a terminal, else lines; see there for the arguments."""
    counted: dict[str, Any] = {"what": what, "total": total, "done": done, "unit": unit, "images": images}
    if console.quiet or not is_watched(console):

        def say(line: str) -> None:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

        yield Follower(show=None, say=None if console.quiet else say, memory=memory, **counted)
        return
    with progress_bar(console, "{task.fields[figures]}") as bar:
        task = bar.add_task(what, total=total, completed=done, figures="")

        def show(done: int, total: int | None, figures: str) -> None:
            bar.update(task, completed=done, total=total, figures=figures)

        yield Follower(show=show, say=None, **counted)


def number(value: float) -> str:
    """Three digits of a number, or all of its whole part: ``4,796``, ``12.3``, ``0.0543``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """``3 d 4 h``, ``5 h 12 min``, ``12 min`` or ``40 s``."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"

"""What a command waits for, on stderr: a bar on a terminal, and lines where there is none. No torch here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import Progress

from bench.messages import visible
from dig.progress import is_watched, progress_bar

PAUSE = 2.0
"""Seconds between two lines, at least."""
AGAIN = 20.0
"""Seconds after which what is still waited for is said again."""


class Waiting:
    """Says what is waited for, how much is done, how long it took and, once it can be known, what is left.

    A context manager. Without a terminal a line is printed for each thing that is waited for; of things that follow one
    another within `PAUSE` the last, once that is over. What lasts is said again.

    Args:
        console: Where.
        total: How many things there are, where that is known.
        clock: Seconds, monotonic.
    """

    def __init__(self, console: Console, *, total: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._total, self._done, self._text = total, 0, "starting"
        self._began, self._said_at, self._said = clock(), -AGAIN, ""
        self._counted = self._since = self._began  # One by one since the first; the present one since the second.
        self._over, self._lock = threading.Event(), threading.Lock()
        self._bar: Progress | None = progress_bar(console) if is_watched(console) else None
        self._task = self._bar.add_task(self._text, total=total or None) if self._bar is not None else None

    def show(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Say what is waited for now; with ``done`` of ``total`` things behind it, where those have changed."""
        with self._lock:
            self._text = visible(text)
            self._since = self._since if done in (None, self._done) else self._clock()
            self._done = self._done if done is None else done
            self._total = self._total if total is None else total
        self._refresh()

    def begin(self) -> None:
        """Things are done one by one from now on: what came before says nothing of how long one of them takes."""
        with self._lock:
            self._counted = self._since = self._clock()

    def advance(self) -> None:
        """One thing more is done."""
        with self._lock:
            self._done += 1
            self._since = self._clock()
        self._refresh(quietly=True)

    def print(self, text: str) -> None:
        """A line that stays."""
        self.console.print(visible(text), markup=False, highlight=False, soft_wrap=True)

    def _refresh(self, *, quietly: bool = False) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=self._text, completed=self._done, total=self._total or None)
        elif not quietly:
            self.tick()

    def tick(self) -> None:
        """Print a line, where one is due."""
        with self._lock:
            since = self._clock() - self._said_at
            if since < (PAUSE if self._text != self._said else AGAIN):
                return
            self._said, self._said_at = self._text, self._clock()
            line = self._line()
        self.print(line)

    def _line(self) -> str:
        now = self._clock()
        of = f"[{self._done} of {self._total} done] " if self._total else ""
        # What comes after all of them, as what was throttled does once more, has limits of its own.
        left = f", about {_minutes(self._left(now))} left" if 0 < self._done < self._total else ""
        return f"{of}{self._text} ({_minutes(now - self._began)} elapsed{left})"

    def _left(self, now: float) -> float:
        """Seconds, if those to come take what those before took; one that takes longer says nothing of the others."""
        each = (self._since - self._counted) / self._done
        others = each * max(0, self._total - self._done - 1)
        return others + max(0.0, each - (now - self._since))

    def _run(self) -> None:
        while not self._over.wait(PAUSE / 2):
            self.tick()

    def __enter__(self) -> Waiting:
        if self._bar is not None:
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._bar is not None:
            self._bar.stop()
        else:
            self._thread.join()


def _minutes(seconds: float) -> str:
    """``3:07``, or ``1:02:03``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"

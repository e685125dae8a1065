"""The logs of a run: figures for every few steps, to every logger that was asked for, and what happened to the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dig.training.loggers import METRICS_NAME, TENSORBOARD_NAME, lines_until, open_sinks

__all__ = ["EVENTS_NAME", "METRICS_NAME", "TENSORBOARD_NAME", "RunLog", "append_event", "lines_until"]

EVENTS_NAME = "events.jsonl"


def append_event(folder: Path, what: str, **details: Any) -> None:
    """Append what happened to a run to its events.

    Args:
        folder: The run's.
        what: ``started``, ``failed``.
        **details: Values of JSON.

    Raises:
        OSError: It can't be written.
    """
    line = {"event": what, "at": datetime.now(UTC).isoformat(timespec="seconds"), **details}
    with (folder / EVENTS_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


class RunLog:
    """Writes the logs of a run that has come as far as ``step``.

    Lines of later steps, which a killed run wrote after its last checkpoint, are taken out: those steps are done again.

    Args:
        folder: The run's.
        step: How many steps lie behind.
        names: Of the loggers.
        about: What the run is.

    Raises:
        ValueError: A logger can't begin.
    """

    def __init__(self, folder: Path, step: int, names: Sequence[str], about: Mapping[str, Any]) -> None:
        self._folder = folder
        self._sinks = open_sinks(names, folder, step, about)

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Log the figures of the steps up to ``step``."""
        for sink in self._sinks:
            sink.metrics(step, values)

    def image(self, step: int, pixels: Any) -> None:
        """Log a grid of samples, (rows, columns, 3) uint8."""
        for sink in self._sinks:
            sink.image(step, pixels)

    def event(self, what: str, **details: Any) -> None:
        """Append what happened to the run: it began, went on, stopped."""
        append_event(self._folder, what, **details)

    def sync(self) -> None:
        """Bring everything written so far onto the disk: before a checkpoint that says these steps are done."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Write everything out."""
        for sink in self._sinks:
            sink.close()


class NoLog(RunLog):
    """The log of a process whose run another one logs: nothing."""

    def __init__(self) -> None:
        self._sinks = []

    def event(self, what: str, **details: Any) -> None:
        """Nothing."""

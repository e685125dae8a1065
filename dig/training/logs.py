"""The logs of a run: a JSON line for every few steps, the same for TensorBoard, and what happened to the run."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dig.packages import is_installed, missing_message
from dig.training.data.files import write_atomically

logger = logging.getLogger(__name__)

METRICS_NAME = "train.jsonl"
EVENTS_NAME = "events.jsonl"
TENSORBOARD_NAME = "tensorboard"


def lines_until(path: Path, step: int) -> list[str]:
    """The whole lines of a log that speak of steps up to ``step``, each step once; a torn last line is left out."""
    kept: dict[int, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            of = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(of, int) and of <= step:
            kept.setdefault(of, line)
    return list(kept.values())


class RunLog:
    """Writes the logs of a run that has come as far as ``step``.

    Lines of later steps, which a killed run wrote after its last checkpoint, are taken out: those steps are done again.

    Args:
        folder: The run's.
        step: How many steps lie behind.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self._events = folder / EVENTS_NAME
        path = folder / METRICS_NAME
        kept = lines_until(path, step)
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if not is_installed("tensorboard"):
            # The same figures are in the JSON lines and the grids in a folder: no reason not to train.
            logger.warning("no logs for TensorBoard: %s", missing_message("tensorboard", "writing them"))
            return
        # Imported where it is needed: it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=step + 1)

    def metrics(self, step: int, values: dict[str, float | None]) -> None:
        """Log the figures of the steps up to ``step``."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if value is not None and self._board is not None:
                self._board.add_scalar(f"train/{name}", value, step)

    def image(self, step: int, pixels: Any) -> None:
        """Log a grid of samples, (rows, columns, 3) uint8."""
        if self._board is not None:
            self._board.add_image("samples", pixels, step, dataformats="HWC")

    def event(self, what: str, **details: Any) -> None:
        """Append what happened to the run: it began, went on, stopped."""
        line = {"event": what, "at": datetime.now(UTC).isoformat(timespec="seconds"), **details}
        with self._events.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Bring everything written so far onto the disk: before a checkpoint that says these steps are done."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Write everything out."""
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()

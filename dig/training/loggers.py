"""Where the figures of a run go: JSON lines, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dig.messages import describe
from dig.packages import is_installed, missing_message, require
from dig.training.data.files import write_atomically

logger = logging.getLogger(__name__)

METRICS_NAME = "train.jsonl"
TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb-id.txt"
WANDB_PROJECT = "dig"
"""Unless WANDB_PROJECT names another."""


class Sink(Protocol):
    """Takes what a run logs."""

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """Figures of the steps up to ``step``; None where there is none."""

    def image(self, step: int, pixels: Any) -> None:
        """A grid of samples, (rows, columns, 3) uint8."""

    def sync(self) -> None:
        """Bring everything onto the disk: a checkpoint that says these steps are done comes next."""

    def close(self) -> None:
        """End."""


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


class JsonLines:
    """A line of JSON each; those of later steps, which a killed run wrote, are taken out."""

    def __init__(self, folder: Path, step: int, _about: Mapping[str, Any]) -> None:
        path = folder / METRICS_NAME
        kept = lines_until(path, step)
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = path.open("a", encoding="utf-8")

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `Sink`."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def image(self, step: int, pixels: Any) -> None:
        """Grids are files of their own."""

    def sync(self) -> None:
        """See `Sink`."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """See `Sink`."""
        self.sync()
        self._file.close()


class Board:
    """TensorBoard's files; those of later steps are marked as done again."""

    def __init__(self, folder: Path, step: int, _about: Mapping[str, Any]) -> None:
        # Imported where it is needed: it takes seconds.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / TENSORBOARD_NAME), purge_step=step + 1)

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `Sink`."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"train/{name}", value, step)

    def image(self, step: int, pixels: Any) -> None:
        """See `Sink`."""
        self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def sync(self) -> None:
        """See `Sink`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Sink`."""
        self._writer.close()


class Wandb:
    """Weights & Biases, on this machine alone unless WANDB_MODE says otherwise.

    A run that goes on keeps its id. Steps that are done again are logged again, with the same figures, which wandb
    leaves out. What fails once training runs is said, and ends this logger and not the run.
    """

    def __init__(self, folder: Path, _step: int, about: Mapping[str, Any]) -> None:
        self._wandb: Any = require("wandb", "--log wandb")
        path = folder / WANDB_ID_NAME
        if not path.is_file():
            write_atomically(path, f"{secrets.token_hex(4)}\n".encode())
        mode = {} if os.environ.get("WANDB_MODE") else {"mode": "offline"}
        project = {} if os.environ.get("WANDB_PROJECT") else {"project": WANDB_PROJECT}
        try:
            self._run: Any = self._wandb.init(
                dir=str(folder),
                name=folder.resolve().name,
                id=path.read_text(encoding="ascii").strip(),
                resume="allow",
                config=dict(about),
                **mode,
                **project,
            )
        except Exception as error:  # Whatever it raises where it can't reach its server, or has no key.
            raise ValueError(f"--log wandb: {describe(error)[:300]}; WANDB_MODE=offline needs no server") from None

    def _try(self, work: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            work()
        except Exception as error:  # Somebody's network is no reason to lose a run.
            logger.warning("no more logs for wandb: %s", describe(error)[:300])
            self._run = None

    def metrics(self, step: int, values: Mapping[str, float | None]) -> None:
        """See `Sink`."""
        there = {f"train/{name}": value for name, value in values.items() if value is not None}
        self._try(lambda: self._run.log(there, step=step))

    def image(self, step: int, pixels: Any) -> None:
        """See `Sink`."""
        self._try(lambda: self._run.log({"samples": self._wandb.Image(pixels)}, step=step))

    def sync(self) -> None:
        """It has a process of its own, which writes."""

    def close(self) -> None:
        """See `Sink`."""
        if self._run is not None:
            self._try(self._run.finish)


SINKS: Mapping[str, Callable[[Path, int, Mapping[str, Any]], Sink]] = {
    "tensorboard": Board,
    "jsonl": JsonLines,
    "wandb": Wandb,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise `dig.packages.MissingPackageError` where a logger's package is missing without which there is nothing."""
    if "wandb" in names:
        require("wandb", "--log wandb")


def open_sinks(names: Sequence[str], folder: Path, step: int, about: Mapping[str, Any]) -> list[Sink]:
    """The loggers of these names, for a run that has come as far as ``step``.

    Args:
        names: Of `SINKS`.
        folder: The run's.
        step: How many steps lie behind.
        about: What the run is.

    Raises:
        ValueError: A logger can't begin.
    """
    sinks: list[Sink] = []
    for name in names:
        if name == "tensorboard" and not is_installed("tensorboard"):
            # The same figures are in the JSON lines and the grids in a folder: no reason not to train.
            logger.warning("no logs for TensorBoard: %s", missing_message("tensorboard", "writing them"))
            continue
        sinks.append(SINKS[name](folder, step, about))
    return sinks

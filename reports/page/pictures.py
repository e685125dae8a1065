"""Figures that are drawn elsewhere and shown as they are: of training, from its logs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import ablation, ablation_runs, fashion
from reports.figures import Drawing
from reports.logs import RunError

Draw = Callable[[Path], tuple[Drawing | None, str, str]]
"""A figure of logs, the command that makes such logs again, and the figure's numbers; empty where logs are these."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture of a section.

    Attributes:
        name: Of its files.
        section: Of the page.
        title: Above it.
        drawing: The figure.
        caption: Beneath it.
        command: What makes it again, training included.
        numbers: What it draws, as CSV; empty where its logs are these numbers.
    """

    name: str
    section: str
    title: str
    drawing: Drawing
    caption: tuple[str, ...]
    command: str
    numbers: str = ""

    @property
    def source(self) -> str:
        """The picture as an address that holds it."""
        content = self.drawing.rendered("svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


def _fashion(folder: Path) -> tuple[Drawing | None, str, str]:
    return fashion.draw(fashion.read_runs(folder)), "bash examples/fashion.sh fashion-mnist out/fashion", ""


def _ablation(file: Path) -> tuple[Drawing | None, str, str]:
    runs = ablation_runs.read_ablation(file)
    # Runs of equal seconds are in no panel, and a file may hold those alone.
    equal = [run for run in runs if run.experiment != ablation_runs.TIMED]
    if not equal:
        return None, "", ""
    return ablation.draw(runs), ablation_runs.repeating_runs(equal), ablation.data(runs)


TRAINED: Sequence[tuple[str, str, Draw]] = (
    ("fashion", "Training on Fashion-MNIST", _fashion),
    ("ablation.jsonl", "DiG's parts, size and tokens", _ablation),
)
"""Folder or file beside the rows, title, and how it is drawn."""
FILES = frozenset(name for name, _, _ in TRAINED)
"""Which of a folder's files are no rows and are drawn all the same."""
PICTURES = tuple(Path(name).stem for name, _, _ in TRAINED)
"""Names of pictures."""


def pictures(paths: Sequence[Path], names: Sequence[str] = PICTURES) -> tuple[list[Picture], list[str]]:
    """Those whose logs lie beside the rows, and what cannot be read there.

    Args:
        paths: Folders of rows; files have nothing beside them.
        names: Which.
    """
    found: list[Picture] = []
    warnings = []
    for path in paths:
        for name, title, draw in TRAINED:
            logs = path / name
            if logs.stem not in names or not path.is_dir() or not logs.exists():
                continue
            try:
                drawing, command, numbers = draw(logs)
            except (RunError, OSError) as error:
                warnings.append(f"no picture of {logs}: {error}")
                continue
            if drawing is None:
                continue
            caption = (f"Drawn from the logs in {logs}.",)
            found.append(
                Picture(
                    name=logs.stem,
                    section="training",
                    title=title,
                    drawing=drawing,
                    caption=caption,
                    command=command,
                    numbers=numbers,
                )
            )
    return found, warnings

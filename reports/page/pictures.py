"""Figures that are drawn elsewhere and shown as they are: of training, from its logs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reports import ablation, fashion
from reports.figures import Drawing
from reports.logs import RunError

Draw = Callable[[Path], Drawing | None]


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
    """

    name: str
    section: str
    title: str
    drawing: Drawing
    caption: tuple[str, ...]
    command: str

    @property
    def source(self) -> str:
        """The picture as an address that holds it."""
        content = self.drawing.rendered("svg", metadata={"Date": None, "Creator": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(content).decode()}"


TRAINED: Sequence[tuple[str, str, Draw, str]] = (
    (
        "fashion",
        "Training on Fashion-MNIST",
        lambda folder: fashion.draw(fashion.read_runs(folder)),
        "bash examples/fashion.sh fashion-mnist out/fashion",
    ),
    (
        "ablation.jsonl",
        "DiG's parts, size and tokens",
        lambda file: ablation.draw(ablation.read_ablation(file)),
        "python examples/ablation.py fashion-mnist out/ablation",
    ),
)
"""Folder or file beside the rows, title, how it is drawn, and the command that fills such a folder."""


def pictures(paths: Sequence[Path]) -> list[Picture]:
    """Those whose logs lie beside the rows; what cannot be read there is left to the command that draws it alone."""
    found = []
    for path in paths:
        for name, title, draw, command in TRAINED:
            logs = path / name
            if not path.is_dir() or not logs.exists():
                continue
            try:
                drawing = draw(logs)
            except (RunError, OSError):
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
                )
            )
    return found

"""``python -m reports.fashion DIR``: losses and Fréchet distances of training runs, from their logs.

DIR holds a folder for each run with ``config.json`` and ``train.jsonl`` as python -m dig train writes them, and
``evaluation.jsonl`` as python -m dig evaluate does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer

from bench.messages import OneLineCommand, say
from bench.store.migrations import rename_backend
from reports import drawing, layout
from reports.drawing import Line, Point
from reports.figures import Drawing
from reports.layout import Style
from reports.logs import Record, RunError, read_lines, read_object
from reports.looks import Looks
from reports.refusing import refusing

LOSS_POINTS = 24
"""A marker for each line of a log would hide the curve: so many windows of lines are drawn."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The logs of one run.

    Attributes:
        folder: Its name.
        model: ``DiG-S/2``.
        implementation: What ran: ``backend=triton``.
        batch: Images a step.
        gpu: Name of the card, or of the processor.
        log: Lines of ``train.jsonl``.
        evaluations: Lines of ``evaluation.jsonl``, by step and number of samples.
        interruptions: How often the run was gone on with.
    """

    folder: str
    model: str
    implementation: str
    batch: int
    gpu: str
    log: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]
    interruptions: int

    @property
    def family(self) -> str:
        """``DiG``."""
        return self.model.rpartition("-")[0]


def read_run(folder: Path) -> Run:
    """Read the logs of one run.

    Raises:
        RunError: A file is missing or is something else.
    """
    content = read_object(folder / "config.json")
    config, environment = content.object("config"), content.object("environment")
    model = config.object("model")
    options = model.object("options")
    words = rename_backend(model.word("name"), {name: options.word(name) for name in options.content})
    hardware = next((name for name in ("gpu_name", "cpu") if environment.content.get(name)), None)
    evaluations = [_evaluation(line) for line in read_lines(folder / "evaluation.jsonl")]
    log = read_lines(folder / "train.jsonl")
    return Run(
        folder=folder.name,
        model=model.word("name"),
        implementation=f"backend={words['backend']}" if "backend" in words else "",
        batch=config.whole("batch", 1),
        gpu=environment.word(hardware) if hardware else "unknown hardware",
        log=tuple({"step": line.whole("step"), "loss": line.number("loss", positive=True)} for line in log),
        evaluations=tuple(sorted(evaluations, key=lambda row: (row["of"]["step"], row["samples"]))),
        interruptions=sum(line.word("event") == "resumed" for line in read_lines(folder / "events.jsonl")),
    )


def _evaluation(line: Record) -> dict[str, Any]:
    of = line.object("of")
    data = None if line.content.get("distance_of_data") is None else line.number("distance_of_data")
    return {
        "metric": line.word("metric"),
        "features": line.word("features"),
        "distance": line.number("distance", positive=True),
        "distance_of_data": data,
        "samples": line.whole("samples", 1),
        "reference": line.whole("reference", 1),
        "of": {"step": of.whole("step"), "seconds": of.number("seconds")},
    }


def read_runs(folder: Path) -> list[Run]:
    """Every run in the folder, by name.

    Raises:
        RunError: There is none, or one can't be read, or their distances are not of the same features.
    """
    runs = [read_run(path.parent) for path in sorted(folder.glob("*/config.json"))]
    if not runs:
        raise RunError(f"{folder} holds no run: a folder with config.json, train.jsonl and evaluation.jsonl")
    for run in runs:
        if not (run.log and run.evaluations):
            raise RunError(f"the run of {run.model} in {folder} has no line of the log, or was not evaluated")
    features = {(row["metric"], row["features"], row["reference"]) for run in runs for row in run.evaluations}
    if len(features) > 1:
        raise RunError(f"the distances in {folder} are of different features or counts, and can't share an axis")
    return runs


def _labels(runs: Sequence[Run]) -> list[str]:
    """What the runs are called: their models, and their folders too where two are of one model."""
    counts = Counter(run.model for run in runs)
    return [run.model if counts[run.model] == 1 else f"{run.model} in {run.folder}" for run in runs]


def _windows(run: Run) -> list[Point]:
    """The loss over windows of the log: mean, least and most."""
    size = math.ceil(len(run.log) / LOSS_POINTS)
    parts = [run.log[i : i + size] for i in range(0, len(run.log), size)]
    points = []
    for part in parts:
        values = [line["loss"] for line in part]
        steps = [line["step"] for line in part]
        points.append(Point(x=sum(steps) / len(steps), y=sum(values) / len(values), low=min(values), high=max(values)))
    return points


def _samples_of_curves(runs: Sequence[Run]) -> int:
    """The number of samples that most checkpoints were measured with: a distance of fewer is a larger one.

    Raises:
        RunError: A run has no checkpoint measured with so many.
    """
    counts = Counter(row["samples"] for run in runs for row in run.evaluations)
    samples = max(counts, key=lambda samples: (counts[samples], samples))
    for run in runs:
        if all(row["samples"] != samples for row in run.evaluations):
            raise RunError(f"{run.model} was not measured with {samples:,} samples, as others were")
    return int(samples)


def _distances(run: Run, x: str, samples: int) -> list[Point]:
    return [
        Point(x=row["of"][x], y=row["distance"], low=row["distance"], high=row["distance"])
        for row in run.evaluations
        if row["samples"] == samples
    ]


def _others(runs: Sequence[Run], samples: int) -> str:
    """What was measured with another number of samples, as a sentence."""
    words = [
        f"{run.model} {row['distance']:.3g} at step {row['of']['step']:,} ({row['samples']:,} samples)"
        for run in runs
        for row in run.evaluations
        if row["samples"] != samples
    ]
    return f" Also measured: {'; '.join(words)}." if words else ""


def _ticks(lines: Iterable[Line]) -> dict[float, str]:
    """Five round values from zero to the last point."""
    most = max(point.x for line in lines for point in line.points) or 1.0
    step = 10 ** math.floor(math.log10(most / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if 5 * factor * step >= most)
    return {i * step: f"{i * step:g}" for i in range(math.ceil(most / step) + 1)}


def _times(count: int) -> str:
    return {0: "never", 1: "once", 2: "twice"}.get(count, f"{count} times")


def draw(runs: Sequence[Run], title: str | None = None) -> Drawing:
    """Loss against steps, and the Fréchet distance against steps and against seconds of training."""
    looks, counts = Looks(), dict[str, int]()
    styles: dict[str, Style] = {}
    labels = _labels(runs)
    for run, label in zip(runs, labels, strict=True):
        styles[label] = looks.style(run.family, counts.get(run.family, 0))
        counts[run.family] = counts.get(run.family, 0) + 1
    samples = _samples_of_curves(runs)
    rows = [row for run in runs for row in run.evaluations if row["samples"] == samples]
    data = [row["distance_of_data"] for row in rows if row["distance_of_data"] is not None]
    floor = f" Two halves of the data are {data[-1]:.3g} apart." if data else ""
    steps = ", ".join(
        f"{label}: {run.implementation}, {_times(run.interruptions)} interrupted"
        for run, label in zip(runs, labels, strict=True)
    )
    hardware = " and ".join(dict.fromkeys(run.gpu for run in runs))
    batches = " and ".join(dict.fromkeys(str(run.batch) for run in runs))
    caption = (
        f"{hardware}. Batches of {batches}. {steps}.\n"
        f"{rows[-1]['metric']} ({rows[-1]['features']}) of {samples:,} samples from the averaged weights, "
        f"without guidance, against {rows[-1]['reference']:,} images of the training data.{floor}"
        f"{_others(runs, samples)} Seconds are those of training steps alone."
    )
    panels = [
        ("(a) Training loss", "Step", "Loss (log axis)", _windows),
        ("(b) Distance by step", "Step", "Fréchet distance (log axis)", lambda run: _distances(run, "step", samples)),
        ("(c) Distance by time", "Seconds of training", "", lambda run: _distances(run, "seconds", samples)),
    ]
    with mpl.rc_context(dict(layout.RC)):
        figure, axes = layout.assemble(
            3, title=title or "Training on Fashion-MNIST, 32×32 pixels", caption=caption, styles=styles
        )
        for place, (heading, x_label, y_label, points) in zip(axes, panels, strict=True):
            lines = [
                Line(label=label, style=styles[label], points=tuple(points(run)))
                for run, label in zip(runs, labels, strict=True)
            ]
            drawing.draw_panel(
                place,
                lines,
                title=heading,
                x_label=x_label,
                y_label=y_label,
                x_ticks=_ticks(lines),
                failures_at="top",
            )
    return Drawing(figure=figure)


@app.command(cls=OneLineCommand)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the runs' folders; the figure goes there.")],
    title: Annotated[str | None, typer.Option(help="Title, instead of the figure's own.")] = None,
) -> None:
    """Draw training.png and .svg from the logs of training runs.

    Exit status 2: a file cannot be read or written, or there are no runs.
    """
    with refusing(RunError, folder=folder):
        for path in draw(read_runs(folder), title).save(folder, "training"):
            say(f"wrote {path}")


if __name__ == "__main__":
    app(prog_name="python -m reports.fashion")

"""``python -m reports.follow DIR``: do one implementation's losses follow another's, and do they repeat bit for bit?

DIR holds three runs of python -m dig train that differ in implementation and dtype alone: ``reference``, and ``first``
and ``second``, which are the same run made twice. Of each ``config.json`` and ``train.jsonl``, a line for every step.
"""

from __future__ import annotations

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import numpy as np
import typer
from numpy.typing import NDArray

from bench.messages import OneLineCommand, say
from bench.store.files import require_file_or_nothing, write_file
from bench.store.migrations import rename_backend
from reports import drawing, layout
from reports.drawing import Line, Point
from reports.figures import Drawing
from reports.logs import RunError, read_lines, read_object
from reports.looks import Looks
from reports.refusing import refusing

NAMES = ("reference", "first", "second")
WINDOW = 20
BOUND = 0.02
POINTS = 24
"""A marker for each step would hide the curve."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True, kw_only=True)
class Log:
    """A run's losses, model, implementation and dtype.

    Attributes:
        losses: (S,) of steps 1 to S.
        config: As config.json has it.
        environment: Likewise.
    """

    losses: NDArray[np.float64]
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def words(self) -> str:
        """``DiG-S/2, triton, bf16``."""
        model = self.config["model"]
        options = rename_backend(model["name"], model["options"])
        return f"{model['name']}, {options.get('backend', '')}, {self.config['dtype']}"


def read_log(folder: Path) -> Log:
    """Read a run. Raises RunError where a file is missing or a step has no line."""
    content = read_object(folder / "config.json")
    config, environment = content.object("config"), content.object("environment")
    model = config.object("model")
    for record, name in ((model, "name"), (config, "dtype")):
        record.word(name)
    config.whole("batch", 1)
    options = model.object("options")
    if "recurrence" in options.content:
        options.word("recurrence")
    # A run that diverged has losses that are no numbers, and is judged too.
    lines = read_lines(folder / "train.jsonl", finite=False)
    losses = np.array([line.number("loss", finite=False) for line in lines])
    if [line.whole("step") for line in lines] != list(range(1, len(lines) + 1)):
        raise RunError(f"{folder}/train.jsonl has not a line for every step; train with --log-every 1")
    return Log(losses=losses, config=config.content, environment=environment.content)


def read_logs(folder: Path) -> dict[str, Log]:
    """The three runs by name.

    Raises:
        RunError: One can't be read, is shorter than the others or than the window, or is another run altogether.
    """
    logs = {name: read_log(folder / name) for name in NAMES}
    counts = {name: len(log.losses) for name, log in logs.items()}
    if len(set(counts.values())) > 1 or counts["first"] < WINDOW:
        raise RunError(f"the runs in {folder} must have the same steps, {WINDOW} or more; they have {counts}")
    if logs["first"].config != logs["second"].config:
        raise RunError(f"first and second in {folder} are not the same run twice: their configurations differ")
    if _common(logs["reference"].config) != _common(logs["first"].config):
        raise RunError(f"reference and first in {folder} differ in more than implementation and dtype")
    return logs


def _common(config: dict[str, Any]) -> dict[str, Any]:
    options = rename_backend(config["model"]["name"], config["model"]["options"]) | {"backend": None}
    return {**config, "model": {**config["model"], "options": options}, "dtype": None}


def moving_average(values: NDArray[np.float64], window: int = WINDOW) -> NDArray[np.float64]:
    """Means of every ``window`` consecutive values: (S,) to (S - window + 1,)."""
    return np.lib.stride_tricks.sliding_window_view(values, window).mean(1)


def different_tensors(ours: Path, theirs: Path) -> list[str]:
    """Names of the tensors of two safetensors files that differ in dtype, shape or any bit, or are in one file only.

    The format's own header says where each tensor's bytes are, so nothing but the bytes need be understood.

    Raises:
        RunError: A file can't be read, or is something else.
    """
    (first, here), (second, there) = _tensors(ours), _tensors(theirs)
    different = []
    for name in sorted(here.keys() | there.keys()):
        a, b = here.get(name), there.get(name)
        if a is None or b is None or a[0] != b[0] or first[a[1]] != second[b[1]]:
            different.append(name)
    return different


def _tensors(path: Path) -> tuple[mmap.mmap, dict[str, tuple[Any, slice]]]:
    """A file's bytes, and of each tensor what it is and where its bytes are."""
    try:
        require_file_or_nothing(path)
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        entries.pop("__metadata__", None)
        found = {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            if not (type(begin) is type(end) is int and 0 <= begin <= end):
                raise ValueError(f"offsets of {name!r:.80} are no range")
            if start + end > len(content):
                raise ValueError("it is cut off")
            found[name] = ((entry["dtype"], entry["shape"]), slice(start + begin, start + end))
        return content, found
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RunError(f"{path} is no whole safetensors file: {error}") from None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs say.

    Attributes:
        steps: S.
        deviation: The largest |a - r| / r over the moving averages a of first and r of reference.
        deviation_step: The last step of the window where it is.
        losses_identical: Whether first and second have the same losses, bit for bit.
        tensors: How many names of tensors differ between their last checkpoints.
        different: The first few of these names.
    """

    steps: int
    deviation: float
    deviation_step: int
    losses_identical: bool
    tensors: int
    different: tuple[str, ...]

    @property
    def holds(self) -> bool:
        """Whether every bound holds; a deviation that is not a number fails."""
        return self.deviation <= BOUND and self.losses_identical and self.tensors == 0


def judge(logs: dict[str, Log], different: list[str]) -> Verdict:
    """Compare the runs; ``different`` is of the checkpoints of first and second."""
    ours, theirs = (moving_average(logs[name].losses) for name in ("first", "reference"))
    deviations = np.abs(ours - theirs) / np.abs(theirs)
    deviations[~np.isfinite(deviations)] = np.inf
    worst = int(deviations.argmax())
    return Verdict(
        steps=len(logs["first"].losses),
        deviation=float(deviations[worst]),
        deviation_step=worst + WINDOW,
        losses_identical=bool((logs["first"].losses == logs["second"].losses).all()),
        tensors=len(different),
        different=tuple(different[:5]),
    )


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run. Raises RunError where there is none."""
    found = sorted(folder.glob("checkpoints/step-*.safetensors"))
    if not found:
        raise RunError(f"{folder} holds no checkpoint")
    return found[-1]


def draw(logs: dict[str, Log], verdict: Verdict) -> Drawing:
    """The moving averages of both, and how far they are apart."""
    reference, first = logs["reference"], logs["first"]
    lines = []
    for log, look in ((reference, Looks().style("DiT", 0)), (first, Looks().style("DiG", 0))):
        values = moving_average(log.losses)
        lines.append(Line(label=log.words, style=look, points=_points(values)))
    apart = np.abs(moving_average(first.losses) / moving_average(reference.losses) - 1)
    # The axis is logarithmic: equal losses would have no place on it.
    gaps = Line(label=first.words, style=lines[1].style, points=_points(np.maximum(apart, 1e-7)))
    repeated = (
        "The same run made again had the same losses and weights, bit for bit."
        if verdict.losses_identical and not verdict.tensors
        else "The same run made again did NOT repeat bit for bit."
    )
    caption = (
        f"{first.environment.get('gpu_name') or first.environment.get('cpu')}. Fashion-MNIST, batches of "
        f"{first.config['batch']}, means over {WINDOW} steps. Largest relative distance: {verdict.deviation:.2%} in "
        f"the {WINDOW} steps up to {verdict.deviation_step}; dotted, the {BOUND:.0%} allowed. {repeated}"
    )
    ticks = {float(x): str(x) for x in np.linspace(0, verdict.steps, 4).round().astype(int)}
    with mpl.rc_context(dict(layout.RC)):
        figure, axes = layout.assemble(
            2,
            title="The kernels in bf16 against the reference in fp32",
            caption=caption,
            styles={line.label: line.style for line in lines},
        )
        for axis, drawn, title, label in (
            (axes[0], lines, "(a) Training loss", "Loss (log axis)"),
            (axes[1], [gaps], "(b) Relative distance to the reference", "Distance (log axis)"),
        ):
            drawing.draw_panel(
                axis, drawn, title=title, x_label="Step", y_label=label, x_ticks=ticks, failures_at="top"
            )
        axes[1].axhline(BOUND, color=layout.SOFT_INK, linewidth=1, linestyle=":")
        # However far everything stays from the bound, its line is to be seen.
        low, high = axes[1].get_ylim()
        axes[1].set_ylim(min(low, BOUND / 1.5), max(high, 1.5 * BOUND))
    return Drawing(figure=figure)


def _points(values: NDArray[np.float64]) -> tuple[Point, ...]:
    chosen = np.unique(np.linspace(0, len(values) - 1, POINTS).round().astype(int))
    return tuple(
        Point(x=float(i + WINDOW), y=float(values[i]), low=float(values[i]), high=float(values[i])) for i in chosen
    )


@app.command(cls=OneLineCommand)
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of the three runs' logs; the report goes there.")
    ],
    runs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the runs with their checkpoints. Default: the same.")
    ] = None,
) -> None:
    """Say how far the losses of a run are from the reference's, and whether it repeats; write follow.json and .png.

    Exit status 1: the moving averages are further apart than 2%, or the run made twice has not the same bits. 2: a file
    cannot be read or written.
    """
    with refusing(RunError, folder=folder):
        logs = read_logs(folder)
        checkpoints = [last_checkpoint((runs or folder) / name) for name in ("first", "second")]
        verdict = judge(logs, different_tensors(*checkpoints))
        first, reference = logs["first"], logs["reference"]
        content = {
            "runs": [first.words, reference.words],
            **{name: getattr(verdict, name) for name in verdict.__dataclass_fields__},
            "window": WINDOW,
            "bound": BOUND,
            "environment": first.environment,
        }
        # What is no number is no JSON either.
        if not np.isfinite(verdict.deviation):
            content["deviation"] = None
        write_file(folder / "follow.json", json.dumps(content, indent=1) + "\n")
        averages = np.concatenate([moving_average(log.losses) for log in logs.values()])
        if np.isfinite(verdict.deviation) and (averages > 0).all():
            drawn = draw(logs, verdict).rendered("png", dpi=120, metadata={"Software": None})
            write_file(folder / "follow.png", drawn)
        else:
            say("did not write follow.png: a loss is no positive number")
    say(
        f"{first.words} against {reference.words}, {verdict.steps} steps: moving averages of {WINDOW} steps at most "
        f"{verdict.deviation:.3%} apart, up to step {verdict.deviation_step} (bound: {BOUND:.0%})"
    )
    say(f"the run made twice: losses {'identical' if verdict.losses_identical else 'DIFFERENT'}")
    words = f"{verdict.tensors} DIFFERENT: {', '.join(verdict.different)}" if verdict.tensors else "identical"
    say(f"tensors of its last checkpoints: {words}")
    if not verdict.holds:
        raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="python -m reports.follow")

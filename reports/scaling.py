"""``python -m reports.scaling``: what more GPUs would give on paper, and what they gave where it was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from bench.judge.scaling import Point, points
from bench.messages import OneLineCommand, cell, refuse, say
from bench.store.files import write_file
from bench.store.rows import ResultError, Row, read_results
from bench.store.selection import machine
from dig.environment import ROOT
from reports.cells import GIB, MISSING, markdown, number
from reports.refusing import refusing
from reports.scaling_model import (
    Assumed,
    AssumedError,
    MissingRowError,
    Step,
    Work,
    check_on_s,
    rows_used,
    step_of,
    stops_at,
    work_of,
)
from reports.series import DOUBTS, STATUS_NAMES, doubts

ROWS = (
    *(ROOT / "results" / "h100" / f"{name}.jsonl" for name in ("rows", "extra", "best", "scaling")),
    ROOT / "results" / "h200" / "scaling.jsonl",
)
RESOLUTIONS = (256, 1024)
IMAGES = {256: 32, 1024: 8}
"""Of a GPU, where each gets as many whatever their number."""
WEAK, STRONG = (1, 8, 64, 1024), (1, 8, 16, 32, 64, 128, 256)
GLOBAL_BATCH = 256
SHARES, MOST = ("achieved", "overlap", "worth"), 1e18
"""What is at most 1; and what all else is at most."""
BEGIN, END = "<!-- python -m reports.scaling -->", "<!-- end -->"

app = typer.Typer(add_completion=False)


def _table(steps: Sequence[Step]) -> str:
    """Steps as a table; milliseconds."""
    frame = pd.DataFrame(
        {
            "GPUs": step.gpus,
            "by": step.kind,
            "images a GPU": f"{step.images:g}",
            "compute": number(1000 * step.compute_s),
            "communication": number(1000 * step.communication_s),
            "exposed": number(1000 * step.exposed_s),
            "step": number(1000 * step.step_s),
            "images/s": f"{step.images_per_second:,.0f}",
            "efficiency": f"{step.efficiency:.0%}",
        }
        for step in steps
    )
    return markdown(frame.set_index(["GPUs", "by"]))


def steps_of(work: Work, resolution: int, assumed: Assumed) -> tuple[list[Step], list[Step]]:
    """(weak, strong): with as many images on each GPU, and with as many on all together."""
    images = IMAGES[resolution]
    weak = [
        step_of(kind, work, images=images, gpus=gpus, assumed=assumed)
        for gpus in WEAK
        for kind in (("ddp", "fsdp") if gpus > 1 else ("ddp",))
    ]
    strong = [
        step_of(kind, work, images=GLOBAL_BATCH / gpus, gpus=gpus, assumed=assumed, alone=images)
        for gpus in STRONG
        for kind in (("ddp", "fsdp") if gpus > 1 else ("ddp",))
    ]
    return weak, strong


def of_one_device(rows: Sequence[Row]) -> list[Row]:
    """Those of the device that the first row is of: steps of several would not add up."""
    return [row for row in rows if machine(row) == machine(rows[0])]


def on_paper(rows: Sequence[Row], assumed: Assumed) -> str:
    """All that is worked out, as Markdown, from rows of one device.

    Raises:
        MissingRowError: They hold nothing to work it out from.
    """
    rows = of_one_device(rows)
    estimated, measured = check_on_s(rows)
    used = "; ".join(
        f"{row.case.model} {row.case.resolution}px {row.case.mode} batch {row.case.batch}, "
        f"{number(row.median_ms or 0)} ms{''.join(f', {mark}' for mark in doubts(row))}"
        for row in rows_used(rows, RESOLUTIONS)
    )
    parts = [
        f"From these rows of one {machine(rows[0])}, each the newest of its case: {used}.",
        f"The same estimate of DiG-S/2 at 1024 pixels, one image, gives {number(1000 * estimated)} ms; measured: "
        f"{number(1000 * measured)} ms.",
    ]
    for resolution in RESOLUTIONS:
        work = work_of(rows, resolution=resolution, assumed=assumed)
        weak, strong = steps_of(work, resolution, assumed)
        shared = {kind: [step for step in strong if step.kind == kind] for kind in ("ddp", "fsdp")}
        ends = {kind: stops_at(steps, assumed) for kind, steps in shared.items()}
        stops = " and ".join(
            f"at {gpus} GPUs by {kind}" if gpus else f"before any by {kind}" for kind, gpus in ends.items()
        )
        fastest = max(strong, key=lambda step: step.images_per_second)
        parts += [
            f"### {resolution} pixels",
            f"A pass has {number(1000 * work.floor_s)} ms whatever its images, each image adds "
            f"{number(1000 * work.image_s)} ms, AdamW takes {number(1000 * work.optimizer_s)} ms. "
            f"{work.images_at_once(assumed)} images fit at once. Times in the tables are in milliseconds.",
            f"{IMAGES[resolution]} images on each GPU:",
            _table(weak),
            f"{GLOBAL_BATCH} images on all together; efficiency against one GPU with {IMAGES[resolution]} images:",
            _table(strong),
            f"With {assumed.worth:.0%} efficiency or more this ends {stops}. The most images a second are "
            f"{fastest.images_per_second:,.0f}, on {fastest.gpus} GPUs by {fastest.kind}.",
        ]
    return "\n\n".join(parts)


def as_measured(found: Sequence[Point]) -> str:
    """The rows of several GPUs as a table; empty without any."""
    if not any(point.row.case.processes > 1 for point in found):
        return ""
    lines = []
    several = len({machine(point.row) for point in found}) > 1
    for point in found:
        row, case = point.row, point.row.case
        letters = "".join(DOUBTS[mark][0] for mark in doubts(row))
        step = STATUS_NAMES.get(row.status, "") if point.step_ms is None else number(point.step_ms.median)
        peak = row.memory.peak if row.memory is not None else None
        lines.append(
            {
                **({"card": cell(machine(row))} if several else {}),
                "model": cell(f"{case.model} ({', '.join(value for _, value in case.options)})"),
                "GPUs": case.processes,
                "by": cell(f"{case.together}, {case.way}" if case.parallel else case.way),
                "images/s": MISSING if row.fps is None else number(row.fps),
                "step, ms": step + (f"<sup>{letters}</sup>" if letters and point.step_ms else ""),
                "efficiency": MISSING if point.efficiency is None else cell(str(point.efficiency)),
                "exposed, ms": MISSING if point.exposed_ms is None else cell(str(point.exposed_ms)),
                "GiB a GPU": number(peak / GIB) if peak else MISSING,
            }
        )
    marked = {mark for point in found for mark in doubts(point.row)}
    legend = "; ".join(f"{letter}: {meaning}" for mark, (letter, meaning) in DOUBTS.items() if mark in marked)
    table = markdown(pd.DataFrame(lines).set_index([*(["card"] if several else []), "model", "GPUs"]))
    return f"### Measured\n\n{table}" + (f"\n\nOf times with a letter: {legend}." if legend else "")


def told(rows: Sequence[Row], assumed: Assumed) -> str:
    """What the command prints: the estimates from these rows, then what was measured of several GPUs."""
    return "\n\n".join(part for part in (on_paper(rows, assumed), as_measured(points(rows))) if part)


def into_page(page: str, text: str) -> str:
    """A page with what stands between its two marks replaced.

    Raises:
        ResultError: It has not both marks.
    """
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ResultError(f"the page has no {BEGIN} and {END} to write between")
    return f"{head}{BEGIN}\n{text}\n{END}{tail}"


@app.command(cls=OneLineCommand)
def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RESULTS.jsonl", help="Results files. Default: this project's of H100s and H200s."),
    ] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(
            help="One assumption in another way, in bytes and seconds: nic=25e9, per_node=4; may be given again. "
            f"All: {', '.join(f'{f.name}={f.default:g}' for f in dataclasses.fields(Assumed))}."
        ),
    ] = None,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write into this page, between its marks, and print nothing.")
    ] = None,
) -> None:
    """Work out what 8, 64 and 1024 GPUs would give DiG-XL/2, from measured steps of one; print what was measured too.

    Exit status 2: a file can't be read or written, or holds no rows to work from.
    """
    assumed = _assumed(assume or [])
    with refusing(ResultError, MissingRowError, AssumedError, folder=page or Path()):
        rows = [row for path in files or ROWS for row in read_results(path).rows]
        text = told(rows, assumed)
        if page is None:
            typer.echo(text)
            return
        write_file(page, into_page(_read(page), text))
        say(f"wrote {page}")


def _read(page: Path) -> str:
    """The text of a page; else one message and exit status 2."""
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        refuse(f"cannot read {page}: {error.strerror}")
    except UnicodeDecodeError:
        refuse(f"{page} is no text in UTF-8")


def _assumed(words: Sequence[str]) -> Assumed:
    known = {field.name: field for field in dataclasses.fields(Assumed)}
    found: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            refuse(f"--assume takes one of {', '.join(known)}, as nic=25e9; got {word[:80]!r}")
        whole, share = isinstance(known[name].default, int), name in SHARES
        kind = "a whole number" if whole else "a number"
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            refuse(f"--assume {name} takes {kind}, as {name}={known[name].default:g}; got {text[:80]!r}")
        if not 0 < value <= (1 if share else MOST):
            refuse(f"--assume {name} must be above 0 and at most {1 if share else MOST:g}; got {text[:80]}")
        found[name] = value
    return dataclasses.replace(Assumed(), **found)


if __name__ == "__main__":
    app(prog_name="python -m reports.scaling")

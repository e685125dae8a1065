"""``python -m bench profile``. torch is imported only once the input is known to be good."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.cases.choices import one_case
from bench.cli.fitting import fitting
from bench.cli.options import Weights, check_appendable
from bench.messages import refuse, say
from bench.run.lifeline import scratch_folder
from bench.store.files import require_appendable, write_file
from bench.store.lines import ResultError
from bench.store.profiles import ProfileRow, ProfilesWriter
from bench.store.rows import utc_now
from dig.environment import describe_environment


def profile(
    model: Annotated[str, typer.Option(help="Model name, options after colons: DiG-S/2, DiG-S/2:triton.")],
    resolution: Annotated[
        int | None, typer.Option(help="Image side in pixels. Default: 1024 on a GPU, 128 on a CPU.")
    ] = None,
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    weights: Weights = "fp32",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/profile"),
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows",
            help="Append what the step's time goes to, its FLOPs and bytes to this file too: python -m reports.page "
            "shows models beside each other.",
        ),
    ] = None,
) -> None:
    """Profile one step: index.html to read, trace.json for ui.perfetto.dev, profile.json with every figure."""
    case = one_case(
        model,
        resolution=resolution,
        mode=mode,
        execution="eager",
        batch=batch,
        dtype=dtype,
        device=device,
        weights=weights,
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("index.html", "trace.json", "profile.json"):
            require_appendable(out / name)
    except OSError as error:
        refuse(f"cannot write {error.filename or out}: {error.strerror}; choose another --out")
    check_appendable(rows, "--rows")
    from bench.inspect.page import page
    from bench.inspect.profile import profile_case

    environment, started_at = describe_environment(), utc_now()
    with fitting(case), tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
        # Beside the folder, so that a step that fails leaves the pages of the one before as they were.
        trace = Path(folder) / "trace.json"
        found = profile_case(case, trace)
        try:
            write_file(out / "trace.json", trace.read_bytes())
            write_file(out / "index.html", page(found, environment))
            write_file(out / "profile.json", json.dumps({"environment": environment, **asdict(found)}) + "\n")
        except OSError as error:
            refuse(f"cannot write {error.filename or out}: {error.strerror}; choose another --out")
        if rows is not None:
            _append(rows, found.row(environment, started_at))
    for entry in found.kernels[:10]:
        share = "" if entry.share is None else f", {entry.share:.0%} of the roofline"
        say(f"{entry.us:10.1f} us  {entry.calls:4d} x  {entry.name[:80]}{share}")
    say(f"wrote {out / 'index.html'}, trace.json and profile.json")
    if rows is not None:
        say(f"added a row to {rows}")


def _append(path: Path, row: ProfileRow) -> None:
    try:
        with ProfilesWriter(path) as writer:
            writer.write(row)
    except ResultError as error:
        refuse(str(error))

"""``python -m bench profile``. torch is imported only once the input is known to be good."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bench.choices import one_case
from bench.messages import refuse
from dig.environment import describe_environment


def profile(
    model: Annotated[str, typer.Option(help="Model name, options after colons: DiG-S/2, DiG-S/2:triton.")],
    resolution: Annotated[int, typer.Option(help="Image side in pixels.")] = 1024,
    mode: Annotated[str, typer.Option(help="train or forward.")] = "train",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; default as for run.")] = None,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder to write into.")] = Path("out/profile"),
) -> None:
    """Profile one step: index.html to read, trace.json for ui.perfetto.dev, profile.json with every figure."""
    case = one_case(model, resolution=resolution, mode=mode, execution="eager", batch=batch, dtype=dtype, device=device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "index.html").touch()
    except OSError as error:
        refuse(f"cannot write {error.filename or out}: {error.strerror}; choose another --out")
    from bench.profile_page import page
    from bench.profiles import profile_case

    environment = describe_environment()
    found = profile_case(case, out / "trace.json")
    (out / "index.html").write_text(page(found, environment), encoding="utf-8")
    (out / "profile.json").write_text(json.dumps({"environment": environment, **asdict(found)}) + "\n")
    for entry in found.kernels[:10]:
        share = "" if entry.share is None else f", {entry.share:.0%} of the roofline"
        typer.echo(f"{entry.us:10.1f} us  {entry.calls:4d} x  {entry.name[:80]}{share}")
    typer.echo(f"wrote {out / 'index.html'}, trace.json and profile.json")

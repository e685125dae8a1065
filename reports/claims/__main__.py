"""``python -m reports.claims results/h100``: what was claimed, what was measured, and whether it holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from bench.messages import OneLineCommand, say
from bench.store.files import write_file
from bench.store.lines import ResultError
from reports.cells import MISSING, markdown, number
from reports.claims.curves import Between, crossover, exponent
from reports.claims.found import (
    Evidence,
    Finding,
    find,
    growing,
    in_words,
    milliseconds,
    within_step,
)
from reports.claims.said import FILE, Pattern, read_statements
from reports.refusing import refusing

app = typer.Typer(add_completion=False)

CONTESTS = (
    ("rows.jsonl", "train:graph", "S", 1), ("rows.jsonl", "forward:graph", "S", 1),
    ("rows.jsonl", "forward:graph", "XL", 1),
    ("best.jsonl", "train", "S", 1), ("best.jsonl", "train", "S", 32), ("best.jsonl", "train", "XL", 32),
    ("best.jsonl", "forward", "S", 1), ("best.jsonl", "forward", "XL", 1),
)  # fmt: skip
"""File, mode and execution, size and batch of which crossovers are told: as published, and each at its best."""
DIGS = (("DiG (triton)", "DiG-{}/2:triton"), ("DiG (fla)", "DiG-{}/2:fla"))
PEERS = (("DiT", "DiT-{}/2"), ("the best Flash-DiT", "Flash-DiT-{}/2"))
GROWTHS = (
    ("DiG (triton)", "DiG-S/2:triton", 1, 1), ("DiG (fla)", "DiG-S/2:fla", 1, 1), ("DiT", "DiT-S/2", 2, 2),
    ("Flash-DiT (cuDNN)", "Flash-DiT-S/2:sdpa-cudnn", 2, 1), ("DiS", "DiS-S/2", 1, 1),
)  # fmt: skip
"""Name, model, and by which power of its tokens time and memory grow in theory, where tokens are many."""
LARGE = 1024
"""From so many pixels on an exponent is taken: where tokens are few, launches and weights take most of the time."""


def crossovers(evidence: Evidence) -> pd.DataFrame:
    """From which resolution on each DiG is ahead of each peer, as published and at their best."""
    rows = []
    for file, way, size, batch in CONTESTS:
        for dig, name in DIGS:
            for peer, other in PEERS:
                of, than = (
                    evidence.by_resolution(file, Pattern.parse(f"{text.format(size)}@*:{way}:batch={batch}"))
                    for text in (name, other)
                )
                found = crossover(of, than)
                if found is None:
                    continue
                rows.append(
                    {
                        "suite": "as published" if file == "rows.jsonl" else "at its best",
                        "step": f"{way.partition(':')[0]}, {size}/2, batch {batch}",
                        "model": dig,
                        "is ahead of": peer,
                        "where": in_words(found),
                        "interval": _ends(found.side),
                        "at": ", ".join(map(str, found.resolutions)),
                    }
                )
    return pd.DataFrame(rows)


def exponents(evidence: Evidence) -> pd.DataFrame:
    """By which powers of their tokens time and memory of a training step grow, from `LARGE` pixels on."""
    rows = []
    for name, model, time_power, memory_power in GROWTHS:
        of = evidence.by_resolution("rows.jsonl", Pattern.parse(f"{model}@*:train:graph"))
        time, memory = (exponent(growing(of, figure, LARGE)) for figure in (milliseconds, within_step))
        if time is None or memory is None:
            continue
        rows.append(
            {
                "model": name, "time": number(time.value), "its interval": _ends(time), "theory": time_power,
                "memory within a step": number(memory.value), "memory's interval": _ends(memory),
                "memory's theory": memory_power, "at": ", ".join(str(side) for side in of if side >= LARGE),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _ends(found: Between | None) -> str:
    if found is None or found.low is None or found.high is None:
        return MISSING
    low, high = (f"{end:.0f}" if end >= LARGE / 10 else number(end) for end in (found.low, found.high))
    return f"{low} to {high}"


def page(findings: Sequence[Finding], evidence: Evidence) -> str:
    """All of it as Markdown."""
    rows = [
        {
            "claim": finding.said.strip("| ").replace(" | ", ", "),
            "by": finding.source,
            "measured": finding.measured or MISSING,
            "interval": MISSING if finding.interval is None else " to ".join(number(end) for end in finding.interval),
            "verdict": f"**{finding.verdict}**",
            "notes": finding.notes,
            "measure it": f"`{finding.command}`",
        }
        for finding in findings
    ]
    parts = [
        "# Claims",
        "An interval is the widest that the 95% intervals of both medians allow: over the steps of one launch, which "
        "leaves out what differs from launch to launch, or the range of several launches. *Holds*: all of it lies on "
        "the claim's side, or the rows give the printed number to its digits. *Open*: it lies on both sides.",
        markdown(pd.DataFrame(rows).set_index(["claim", "by"])),
    ]
    for title, table, keys, words in (
        ("Crossovers", crossovers(evidence), ["suite", "step", "model", "is ahead of"], CROSSOVERS_ARE),
        ("How time and memory grow", exponents(evidence), ["model"], EXPONENTS_ARE),
    ):
        if not table.empty:
            parts += [f"## {title}", words, markdown(table.set_index(keys))]
    return "\n\n".join(parts) + "\n"


CROSSOVERS_ARE = (
    "From which resolution on a model takes less time than another. Between two measured resolutions the logarithm of "
    "the times' ratio is taken as linear in that of the tokens; the interval is where the ratios' intervals cross 1."
)
EXPONENTS_ARE = (
    f"The power of the tokens by which a training step of S/2 grows from {LARGE} pixels on: the slope of least squares "
    "between logarithms, with its 95% interval. In theory linear recurrences grow by 1, attention by 2, and fused "
    "attention's memory by 1, where tokens are so many that nothing else counts."
)


@app.command(cls=OneLineCommand)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a machine's rows, as results/h100.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write claims.md and claims.json there; else print.")
    ] = None,
    claims: Annotated[Path, typer.Option("--claims", metavar="FILE.toml", help="The claims.")] = FILE,
) -> None:
    """Hold claims of the paper and of the README against measured rows.

    Exit status 2: a file cannot be read or written, or is none of these.
    """
    with refusing(ResultError, folder=out or Path(), hint="; choose another --out"):
        statements = read_statements(claims)
        if not folder.is_dir():
            raise ResultError(f"{folder} is no folder; name one that holds rows.jsonl")
        evidence = Evidence(folder)
        findings = [find(statement, evidence) for statement in statements]
        text = page(findings, evidence)
        if out is None:
            typer.echo(text, nl=False)
            return
        out.mkdir(parents=True, exist_ok=True)
        content = [dataclasses.asdict(finding) for finding in findings]
        for name, written in (("claims.md", text), ("claims.json", json.dumps(content, indent=1) + "\n")):
            write_file(out / name, written.encode())
            say(f"wrote {out / name}")


if __name__ == "__main__":
    app(prog_name="python -m reports.claims")

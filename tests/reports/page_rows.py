"""A folder of everything that the page shows, with a text wherever a row may hold one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.cases.case import Case
from bench.store.ledgers import Memory, Timing
from bench.store.profiles import Part, ProfileRow
from bench.store.rows import Row
from tests.reports.conftest import GPU, build_row
from tests.reports.test_report_sampling import ROWS as SAMPLED

HOSTILE = (
    "<script>document.title = 'taken'</script>",
    '"><img src=x onerror="document.title = \'taken\'">',
    "'; document.title = 'taken'; '",
    "</script><b>x</b>",
    "{{ 7 * 7 }} ${7} `id`",
    "<a href=\"javascript:document.title='taken'\">x</a>",
)
MODELS = (
    ("DiG", "triton", 2.0),
    ("DiG", "fla", 5.0),
    ("Flash-DiT", "sdpa-cudnn", 4.0),
    ("DiT", "materialized", 20.0),
    ("DiS", "mamba-ssm", 30.0),
)
CARD = {**GPU, "gpu_name": "NVIDIA H200"}


def timed(family: str, backend: str, size: str, resolution: int, ms: float, **changes: Any) -> Row:
    """A row with a ledger and the eager step's time; DiT runs out of memory at 2048."""
    options = (("backend", backend), *changes.pop("options", ()))
    if family == "DiT" and resolution == 2048:
        return build_row(
            f"{family}-{size}/2", resolution, status="oom", message="too large", options=options, **changes
        )
    ms *= (resolution / 256) ** (2 if "DiT" in family else 1)
    samples = tuple(ms * (1 + step / 100) for step in range(10))
    row = build_row(
        f"{family}-{size}/2", resolution, samples_ms=samples, options=options, flops=10**12, matmul_ceiling=6e14,
        **changes,
    )  # fmt: skip
    gib = 2**30
    memory = Memory(
        parameters=gib // 8, gradients=gib // 8, optimizer=gib // 4, resident=gib // 7,
        activations=gib * resolution // 512, allocator_peak=gib // 4 + gib // 7 + gib * resolution // 512,
        process_peak=gib + gib * resolution // 512,
    )  # fmt: skip
    timing = Timing(warmup="steady", warmup_steps=9, ci_low=ms, ci_high=ms, eager_ms=2 * ms + 90, graph_ms=ms)
    return replace(row, memory=memory, timing=timing)


def step_rows(text: str = "", environment: dict[str, Any] | None = None) -> list[Row]:
    """Both of the paper's figures in small; with a text, one more series that holds it in every word."""
    rows = [
        timed(family, backend, size, resolution, ms, mode=mode, **({"environment": environment} if environment else {}))
        for family, backend, ms in MODELS
        for size, resolution, mode in (
            ("S", 256, "train"), ("S", 1024, "train"), ("S", 2048, "train"), ("S", 1024, "forward"),
            ("B", 1024, "forward"), ("S", 2048, "forward"), ("B", 2048, "forward"),
        )
    ]  # fmt: skip
    # Their launches take 30 ms, whatever the brief trial beside the graph's row says.
    rows += [
        replace(row, case=replace(row.case, execution="eager"), samples_ms=tuple(ms + 30 for ms in row.samples_ms))
        for row in rows
        if row.status == "ok" and (row.case.size, row.case.resolution, row.case.mode) == ("S", 1024, "train")
    ]
    if text:
        where = {"gpu_name": GPU["gpu_name"], "torch": text, "commit": text, "cpu": text}
        fields = {"environment": where, "mode": "train", "options": (("word", text),)}
        rows += [timed("DiG", "triton", "S", side, 3.0, **fields) for side in (256, 1024)]
        rows.append(build_row("DiG-S/2", 512, status="error", message=text, environment=where))
    return rows


def best_rows() -> list[Row]:
    """DiG in a graph, Flash-DiT compiled: a lead at two resolutions."""
    compiled = {"execution": "compiled-graph", "scope": "block"}
    return [
        row
        for side in (256, 1024)
        for row in (
            timed("DiG", "triton", "S", side, 2.1, mode="train"),
            timed("Flash-DiT", "flash-attn-4", "S", side, 3.0, mode="train", **compiled),
        )
    ]


def profiled(backend: str = "triton", **changes: Any) -> ProfileRow:
    """Where a step's time goes: a quarter, a half, a quarter."""
    case = Case(model="DiG-S/2", options=(("backend", backend),), resolution=1024, mode="train", execution="eager")
    parts = (Part(name="products", us=1000, calls=9), Part(name="heart", us=2000, calls=4),
             Part(name="rest", us=1000, calls=30))  # fmt: skip
    fields: dict[str, Any] = {
        "case": case, "started_at": "2026-11-22T10:00:00Z", "parts": parts, "flops": 1e12, "bytes": 1e9,
        "flop_rate": 6e14, "byte_rate": 3e12, "wall_us": 9000, "environment": GPU,
    }  # fmt: skip
    return ProfileRow(**{**fields, **changes})


def probes(text: str = "") -> list[dict[str, Any]]:
    """A search for the largest batch: 48 fits, 49 does not."""
    case = {"model": "DiG-XL/2", "options": {"backend": "triton"}, "resolution": 256, "mode": "train",
            "execution": "graph"}  # fmt: skip
    where = {**GPU, "commit": text or "0123456789"}
    return [
        {"case": {**case, "batch": batch}, "fits": batch <= 48, "peak": batch * 2**30 if batch <= 48 else None,
         "limit": None, "environment": where}
        for batch in (1, 32, 64, 48, 49)
    ]  # fmt: skip


def claims(text: str = "") -> list[dict[str, Any]]:
    """One that holds, one that fails, one that nobody measured, and one of somebody else's that is folded away."""
    return [
        {"id": "speed", "source": "the paper", "said": "2.5 times at 1792", "measured": 9.6, "interval": [9.5, 9.7],
         "verdict": "holds", "command": "python -m bench run --suite paper", "notes": text,
         "judging": "python -m reports.claims out/results.jsonl --id speed",
         "again": "python -m reports.claims rows.jsonl --id speed"},
        {"id": "memory", "source": "the paper", "said": "-75.7%", "measured": "-60%", "interval": None,
         "verdict": "does not hold", "command": "", "notes": ""},
        {"id": text or "later", "source": text, "said": text or "later", "measured": None, "interval": None,
         "verdict": text or "not measured", "command": text, "notes": None},
        {"id": "lead", "source": "README, leads", "said": "1.33 times", "measured": "1.33 times", "interval": None,
         "verdict": "holds", "command": "", "notes": ""},
    ]  # fmt: skip


def _write(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def write_everything(folder: Path, text: str = "") -> Path:
    """The folder, made."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "rows.jsonl", (row.to_json() for row in step_rows(text)))
    _write(folder / "best.jsonl", (row.to_json() for row in best_rows()))
    _write(folder / "other.jsonl", (row.to_json() for row in step_rows(environment=CARD)))
    sampled = [replace(row, environment={**row.environment, "commit": text}) for row in SAMPLED] if text else SAMPLED
    _write(folder / "sampling.jsonl", (row.to_json() for row in sampled))
    _write(folder / "capacity.jsonl", map(json.dumps, probes(text)))
    _write(folder / "profiles.jsonl", (profiled(backend).to_json() for backend in ("triton", "fla")))
    (folder / "claims.json").write_text(json.dumps(claims(text)))
    return folder

"""Files of other rows, given to commands that read rows of steps: one line says what they are and what reads them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cli.main import app
from bench.ops.rows import OpCase, OpRow
from bench.store.kinds import BY_FIELDS, BY_KIND, other_kind
from bench.store.profiles import PARTS, Part, ProfileRow
from bench.store.rows import ResultError, Row
from dig.environment import ROOT

PUBLISHED = ROOT / "results" / "h100"
OP = OpCase(
    op="srem", implementation="reference", model="DiG-S/8", resolution=64, mode="forward", dtype="fp32", device="cpu"
)
AT = "2026-01-01T00:00:00+00:00"
CASE = Case(model="DiT-S/8", resolution=64, device="cpu", dtype="fp32")


def first(name: str) -> str:
    return (PUBLISHED / name).read_text().partition("\n")[0]


def probe() -> str:
    """As bench capacity writes it today; published ones are older."""
    return json.dumps({"case": {"model": "DiT-S/8"}, "fits": True, "peak": 1, "limit": None, "environment": {}})


LINES: dict[str, tuple[str, str]] = {
    "sampling": (first("sampling.jsonl"), "a row of sampling; python -m reports.sampling reads it"),
    "older probe": (first("capacity.jsonl"), "a probe of bench capacity; python -m reports.page reads it"),
    "probe": (probe(), "a probe of bench capacity; python -m reports.page reads it"),
    "training": (first("training/graph.jsonl"), "a line of a training log"),
    "operation": (
        OpRow(case=OP, status="ok", started_at=AT, samples_ms=(1.0,)).to_json(),
        "a row of bench ops compare, which judges its rows itself",
    ),
    "profile": (
        ProfileRow(
            case=CASE, started_at=AT, parts=tuple(Part(name=name, us=1.0, calls=1) for name in PARTS), flops=1.0,
            bytes=1.0, flop_rate=1.0, byte_rate=1.0, wall_us=1.0,
        ).to_json(),
        "a row of bench profile; python -m reports.page reads it",
    ),
    "ops": ('{"B":1,"rows":4,"columns":4,"D":8,"implementation":"triton"}', "a line of bench ops"),
    "ops in steps": ('{"case":{},"ms":1.0,"device":"H100"}', "a line of bench ops"),
    "ablation": ('{"experiment":"srem","arm":"causal","seed":0}', "a run of examples/ablation.py"),
}  # fmt: skip


@pytest.mark.parametrize("line", LINES)
def test_a_row_of_another_kind_says_what_it_is(line: str) -> None:
    text, said = LINES[line]
    with pytest.raises(ResultError, match=f"^not a result row, but {re.escape(said)}"):
        Row.from_json(text)


@pytest.mark.parametrize(("command", "files"), [("compare", 2), ("export", 1)])
def test_commands_say_it_in_one_line(command: str, files: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES["sampling"][0] + "\n")
    result = CliRunner().invoke(app, [command, *[str(path)] * files])
    assert result.exit_code == 2, result.output
    assert result.output == f"error: {path}, line 1: not a result row, but {LINES['sampling'][1]}\n"


def test_every_kind_is_known_and_every_table_entry_is_met() -> None:
    sources = [path.read_text() for path in (ROOT / "bench").rglob("*.py")]
    kinds = {kind for text in sources for kind in re.findall(r'^KIND = "(\w+)"$', text, re.MULTILINE)}
    assert kinds == set(BY_KIND)
    met = {other_kind(json.loads(text)) for text, _ in LINES.values()}
    assert met == {*BY_KIND.values(), *(said for _, said in BY_FIELDS)}


@pytest.mark.parametrize("record", [{}, {"kind": "else"}, {"kind": 3}, {"schema": 9, "fits": 1, "peak": 2}])
def test_what_is_unknown_is_refused_otherwise(record: dict[str, Any]) -> None:
    assert other_kind(record) == ""
    with pytest.raises(ResultError, match="schema"):
        Row.from_json(json.dumps(record))

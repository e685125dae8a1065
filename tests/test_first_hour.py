"""A new user's first hour, in small: every command of it works, and what it says reads well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench.store.rows import read_results
from dig.environment import ROOT

SCRIPT = ROOT / "examples" / "first-hour.sh"
SMALL = {"INSTALL": "0", "STEPS": "4", "BATCH": "4", "SAMPLES": "6", "LAUNCHES": "1", "SIZE": "16"}


def run(out: Path) -> str:
    environment = {**os.environ, **SMALL, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = ["bash", str(SCRIPT), str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return said


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = run(out)
    assert "Traceback" not in said
    assert "error:" not in said
    rows = read_results(out / "monday.jsonl").rows
    assert {row.case.family: row.status for row in rows} == {"DiG": "ok", "DiT": "ok"}
    # It was stopped, and went on.
    events = [json.loads(line)["event"] for line in (out / "run" / "events.jsonl").read_text().splitlines()]
    assert "stopped" in events
    assert "resumed" in events
    assert events[-1] == "finished"
    assert len(list((out / "samples").glob("*.png"))) == 8
    assert Image.open(out / "grid.png").size[0] > 3 * 8 * 16
    assert json.loads((out / "quality.jsonl").read_text())["samples"] == 6
    # Its weights went on to other classes.
    assert "label table: 3 classes to 2: 1 of the same name kept, 1 new" in said
    assert json.loads((out / "tuned" / "config.json").read_text())["config"]["freeze"] == ["blocks.0.*"]
    assert "from Python: samples of red, yellow (2, 3, 16, 16)" in said
    assert "classes of the model: red, yellow" in said
    apart = float(said.split("ours are at most ")[1].split()[0])
    assert apart < 1e-5
    # Nothing that a reader has to look at twice: paths and sizes, no names of Python's.
    assert "<class" not in said
    assert "object at 0x" not in said


def test_its_parts_are_all_there() -> None:
    text = SCRIPT.read_text()
    assert max(map(len, text.splitlines())) <= 120
    parts = ("pip install", "bench list", "bench run", "bench compare", "reports")
    for part in (
        *parts,
        "dig train",
        "dig sample",
        "dig classifier",
        "dig evaluate",
        "dig export",
        "dig train --resume",
    ):
        assert f"-m {part}" in text.replace('"$python" ', ""), part
    assert "--init" in text

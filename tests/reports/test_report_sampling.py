"""Table and bars of sampling speeds: what they show is what the rows say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.sampling.rows import RowsWriter, SamplingCase, SamplingRow, compare
from reports.sampling import app, draw, table

DIG = SamplingCase(model="DiG-XL/2", options=(("backend", "triton"), ("variant", "release")), resolution=256, batch=32)
FLASH = replace(DIG, model="Flash-DiT-XL/2", options=(("backend", "sdpa-cudnn"),))


def row(case: SamplingCase, *seconds: float, **fields: Any) -> SamplingRow:
    environment = {"gpu_name": "NVIDIA H100", "torch": "2.11.0", "commit": "0123456789abcdef"}
    content = {"status": "ok", "run": "1", "environment": environment, "peak_memory_gib": 4.25, **fields}
    return SamplingRow(case=case, seconds=seconds, **content)


ROWS = [
    row(DIG, 2.0, 2.5, 2.0),
    row(FLASH, 4.0, 4.0, 5.0),
    row(replace(DIG, resolution=1024, batch=4), 1.0, 1.0, 1.0),
    row(replace(FLASH, resolution=1024, batch=4), status="oom", message="full"),
]


def test_the_table_says_what_the_rows_say() -> None:
    text = table(compare(ROWS))
    assert "NVIDIA H100, torch 2.11.0, commit 0123456789" in text
    assert "without decoding" in text
    assert "## ddim, 50 steps, guidance 1.5 (three channels), bf16, graph, cuda" in text
    assert "| 256 | 32 | DiG-XL/2 (triton, release) | 16 (12.8 to 16) | 75.0% | 2 (1.6 to 2.5) | 4.25 |" in text
    assert "| 256 | 32 | Flash-DiT-XL/2 (sdpa-cudnn) | 8 (6.4 to 8) | 75.0% | peer | 4.25 |" in text
    assert "| 1024 | 4 | Flash-DiT-XL/2 (sdpa-cudnn) | OOM |" in text
    assert "| 1024 | 4 | DiG-XL/2 (triton, release) | 4 (4 to 4) | 75.0% |  | 4.25 |" in text


def test_the_bars_are_the_medians() -> None:
    drawn = draw(compare(ROWS))
    assert drawn is not None
    small, large = drawn.figure.axes
    assert {bar.get_gid(): bar.get_height() for bar in small.patches} == {
        "bar:DiG-XL/2 (triton, release)": 16,
        "bar:Flash-DiT-XL/2 (sdpa-cudnn)": 8,
    }
    assert [bar.get_height() for bar in large.patches] == [4]
    assert large.get_title("left") == "1024 pixels, 4 at once"
    assert draw(compare(ROWS[3:])) is None


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    result = CliRunner().invoke(app, [str(file)])
    assert result.exit_code == 2
    assert "cannot read" in result.output
    with RowsWriter(file) as writer:
        for each in ROWS:
            writer.write(each)
    with file.open("ab") as stream:
        stream.write(b'{"kind":')
    result = CliRunner().invoke(app, [str(file), "--title", "Speed"])
    assert result.exit_code == 0, result.output
    assert "ends inside a row" in result.output
    assert (tmp_path / "sampling.md").read_text().startswith("# Speed\n")
    assert (tmp_path / "sampling.png").stat().st_size > 10_000
    file.write_text('{"schema": 1}\n')
    result = CliRunner().invoke(app, [str(file)])
    assert result.exit_code == 2
    assert "line 1" in result.output


def test_it_needs_no_torch() -> None:
    code = "import reports.sampling, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("many", [4])
def test_more_panels_than_fit_are_left_out(many: int) -> None:
    rows = [row(replace(DIG, resolution=256 * i), 1.0) for i in range(1, many + 1)]
    drawn = draw(compare(rows))
    assert drawn is not None
    assert len(drawn.figure.axes) == 3

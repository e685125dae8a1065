"""The result row and its file: nothing whole is lost, nothing torn is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.results import Case, Memory, ResultError, ResultsWriter, Row, read_results


def make_row(**changes: object) -> Row:
    case = Case(model="DiG-S/2", options=(("recurrence", "fla"),), resolution=1024)
    memory = Memory(parameters=10, resident=20, allocator_peak=30, reserved_peak=40, process_peak=50)
    fields: dict[str, object] = {
        "case": case,
        "status": "ok",
        "started_at": "2026-01-01T00:00:00+00:00",
        "samples_ms": (2.0, 1.0, 4.0),
        "memory": memory,
        "parameters": 10,
        "flops": 10**9,
        "matmul_ceiling": 1e12,
        "implementations": {"recurrence": "fla"},
        "environment": {"gpu_name": "H100", "packages": {"flash-attn": "2.8.3"}},
    }
    return Row(**{**fields, **changes})


def test_round_trip() -> None:
    for row in (make_row(), make_row(status="oom", samples_ms=(), memory=None, message="CUDA out of memory")):
        assert Row.from_json(row.to_json()) == row
        assert "\n" not in row.to_json()


def test_what_a_row_derives() -> None:
    row = make_row()
    assert row.median_ms == 2.0
    assert row.fps == 500.0
    assert row.ceiling_share == pytest.approx(0.5)
    assert row.memory.peak == 30
    assert Memory(parameters=1, process_peak=7).peak == 7
    assert make_row(status="oom", samples_ms=()).fps is None


def test_case_knows_its_parts() -> None:
    case = Case(model="Flash-DiT-XL/4", resolution=256, options=(("b", "2"), ("a", "1")))
    assert (case.family, case.size, case.patch) == ("Flash-DiT", "XL", 4)
    assert case.options == (("a", "1"), ("b", "2"))
    assert case.describe() == "Flash-DiT-XL/4 (a=1, b=2) 256px train eager bf16 batch 1 on cuda"


@pytest.mark.parametrize(
    "change",
    [
        {"status": "ok", "samples_ms": ()},
        {"status": "oom"},
        {"status": "fine"},
        {"samples_ms": (1.0, float("nan"))},
        {"samples_ms": (0.0,)},
    ],
)
def test_a_row_that_contradicts_itself_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=r"samples_ms|status"):
        make_row(**change)


@pytest.mark.parametrize(
    "change", [{"mode": "sample"}, {"batch": 0}, {"batch": True}, {"resolution": 2.5}, {"dtype": "fp8"}]
)
def test_a_case_that_cannot_be_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        Case(**{"model": "DiG-S/2", "resolution": 256, **change})


@given(st.binary(max_size=200))
def test_reader_never_crashes_and_never_invents(content: bytes) -> None:
    try:
        row = Row.from_json(content.decode())
    except (ResultError, UnicodeDecodeError):
        return
    assert Row.from_json(row.to_json()) == row


@given(st.integers(0, 10_000), st.text(max_size=3))
def test_a_damaged_row_is_an_error_or_the_same_row(position: int, junk: str) -> None:
    line = make_row().to_json()
    position %= len(line)
    damaged = line[:position] + junk + line[position + 1 :]
    try:
        row = Row.from_json(damaged)
    except ResultError:
        return
    assert Row.from_json(row.to_json()) == row


def test_newer_schema_is_refused() -> None:
    with pytest.raises(ResultError, match="update the project"):
        Row.from_json(make_row().to_json().replace('"schema":1', '"schema":99'))


def test_a_torn_line_is_set_aside_and_nothing_else_lost(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer:
        writer.write(make_row())
        assert writer.torn_path is None
    half = make_row().to_json()[:40]
    with path.open("a") as file:
        file.write(half)
    assert len(read_results(path).rows) == 1
    assert read_results(path).torn == half.encode()
    other = make_row(case=Case(model="DiT-S/2", resolution=512))
    with ResultsWriter(path) as writer:
        assert writer.torn_path is not None
        assert writer.torn_path.read_text() == half + "\n"
        writer.write(other)
    assert [row.case.model for row in read_results(path).rows] == ["DiG-S/2", "DiT-S/2"]
    assert read_results(path).torn == b""


def test_a_bad_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(make_row().to_json() + "\nnonsense\n")
    with pytest.raises(ResultError, match=r"results\.jsonl, line 2: not JSON"):
        read_results(path)
    with pytest.raises(ResultError, match="cannot read"):
        read_results(tmp_path / "absent.jsonl")


def test_the_latest_row_of_a_case_counts(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer:
        for ms in (9.0, 2.0):
            writer.write(make_row(samples_ms=(ms,)))
    assert [row.samples_ms for row in read_results(path).latest().values()] == [(2.0,)]


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = "import sys, bench.results as r, pathlib\ntry: r.ResultsWriter(pathlib.Path(sys.argv[1]))\n"
    code += "except r.ResultError as e: print(e)"
    with ResultsWriter(path):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "is being written by another run" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        ResultsWriter(tmp_path / "file" / "results.jsonl")

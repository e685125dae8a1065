"""The result row and its file: nothing whole is lost, nothing torn is read."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.cases.case import Case
from bench.store.files import write_file
from bench.store.ledgers import Checks, Clocks, Memory, Placement, Rank, Scaling, Timing
from bench.store.migrations import SCHEMA
from bench.store.rows import ResultError, ResultsWriter, Row, read_results
from dig.family import Look


def make_row(**changes: object) -> Row:
    case = Case(model="DiG-S/2", options=(("backend", "fla"),), resolution=1024)
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
    line = make_row().to_json().replace('"schema":6', '"schema":7')
    with pytest.raises(ResultError, match=r"schema 7 is newer than .* \(6\); update the project"):
        Row.from_json(line)


@pytest.mark.parametrize("version", ["0", "-1", "true", "1.0", '"2"', "null"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(ResultError, match="is no version of a result row"):
        Row.from_json(make_row().to_json().replace('"schema":6', f'"schema":{version}'))


def test_a_row_of_schema_1_reads_as_it_was_meant() -> None:
    line = (
        '{"schema":1,"case":{"model":"DiG-S/2","options":{"recurrence":"fla"},"resolution":256,"batch":1,"mode":"train",'
        '"execution":"graph","dtype":"bf16","device":"cuda"},"status":"ok","started_at":"2026-11-23T19:22:53+00:00",'
        '"message":"","samples_ms":[5.5,5.4],"memory":{"parameters":1,"resident":2,"allocator_peak":3,'
        '"reserved_peak":4,"process_peak":5,"process_source":"nvml-process"},"parameters":7,"flops":8,'
        '"matmul_ceiling":1e14,"implementations":{"recurrence":"fla"},"stop_reason":"samples",'
        '"seconds":{"start":4.9},"environment":{"commit":"888"}}'
    )
    row = Row.from_json(line)
    assert (row.launch, row.key, row.marks, row.timing) == (0, "", ("unwatched",), None)
    assert (row.memory.allocator_peak, row.memory.gradients) == (3, None)
    assert row.samples_ms == (5.5, 5.4)
    assert row.case.options == (("backend", "fla"),)
    assert Row.from_json(row.to_json()) == row
    with pytest.raises(ResultError, match="a row of schema 1 has no field 'marks'"):
        Row.from_json(line.replace('"message":""', '"marks":[]'))


ROOT = Path(__file__).parents[2]
H100, H200 = (ROOT / "results" / name for name in ("h100", "h200"))
ALL = {"fla", "materialized", "sdpa-cudnn", "mamba-ssm"}


@pytest.mark.parametrize(
    ("path", "count", "backends"),
    [
        (H100 / "rows.jsonl", 167, ALL),
        (H100 / "extra.jsonl", 51, {"triton", "sdpa-cudnn", "flash-attn-4-padded"}),
        (H100 / "eager.jsonl", 9, {"triton", "sdpa-cudnn"}),
        (H100 / "whole.jsonl", 7, {"triton", "sdpa-cudnn", "flash-attn-4"}),
        (H100 / "bare.jsonl", 12, ALL | {"triton", "flash-attn"}),
        (H100 / "scaling.jsonl", 16, {"triton", "sdpa-cudnn"}),
        (H200 / "scaling.jsonl", 9, {"triton", "sdpa-cudnn"}),
        (H200 / "best.jsonl", 88, ALL | {"triton", "flash-attn", "flash-attn-4", "flash-attn-4-padded"}),
        (H200 / "batch32.jsonl", 35, {"triton", "fla", "materialized", "sdpa-cudnn", "flash-attn"}),
        (H200 / "batch32-best.jsonl", 6, {"materialized", "sdpa-cudnn", "flash-attn-4"}),
        (H100 / "best.jsonl", 80, ALL | {"triton", "flash-attn", "flash-attn-4", "flash-attn-4-padded"}),
        (ROOT / "tests" / "data" / "schema-1.jsonl", 132, ALL),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_every_published_row_can_be_read(path: Path, count: int, backends: set[str]) -> None:
    rows = read_results(path).rows
    assert len(rows) == count
    assert all(Row.from_json(row.to_json()) == row for row in rows)
    assert {dict(row.case.options)["backend"] for row in rows} >= backends


def older(line: str, version: int) -> str:
    """A line of the present schema as an older one had it, as far as nothing was said that it knew no word for."""
    record = json.loads(line)
    new = {3: ("look",), 5: ("placement", "scaling")}
    for name in (name for schema, names in new.items() if schema > version for name in names):
        assert record.pop(name) is None
    if version < 6:
        record["case"].pop("sending")
    if version < 5:
        assert (record["case"].pop("processes"), record["case"].pop("parallel")) == (1, "")
    return json.dumps({**record, "schema": version}, separators=(",", ":"))


def test_a_row_of_schema_2_calls_the_backend_as_its_family_did() -> None:
    line = make_row(case=Case(model="DiS-S/2", options=(("backend", "mamba-ssm"),), resolution=64)).to_json()
    assert Row.from_json(older(line, 2).replace('"backend"', '"mixer"')) == Row.from_json(line)
    with pytest.raises(ResultError, match="a row of schema 2 has no field 'look'"):
        Row.from_json(older(line, 3).replace('"schema":3', '"schema":2'))


@pytest.mark.parametrize("version", [3, 4])
def test_rows_before_schema_5_know_one_process_and_one_gpu(version: int) -> None:
    line = make_row().to_json()
    row = Row.from_json(older(line, version))
    assert row == Row.from_json(line)
    assert (row.case.processes, row.case.parallel, row.placement, row.scaling) == (1, "", None, None)
    with pytest.raises(ResultError, match=f"a row of schema {version} has no field '(placement|scaling)'"):
        Row.from_json(line.replace('"schema":6', f'"schema":{version}'))
    alien = older(line, version).replace('"batch":1', '"batch":1,"processes":2')
    with pytest.raises(ResultError, match=r"has no field 'case\.processes'"):
        Row.from_json(alien)


def test_rows_before_schema_6_sent_by_collectives() -> None:
    several = make_row(case=Case(model="DiG-S/2", resolution=256, processes=2, parallel="ddp"))
    copies = replace(several, case=replace(several.case, sending="copies"))
    assert Row.from_json(older(several.to_json(), 5)).case.sending == "collectives"
    assert Row.from_json(older(make_row().to_json(), 5)).case.sending == ""
    assert Row.from_json(copies.to_json()).case.describe().endswith("2 processes by ddp by copies")
    with pytest.raises(ResultError, match=r"a row of schema 5 has no field 'case\.sending'"):
        Row.from_json(copies.to_json().replace('"schema":6', '"schema":5'))


@pytest.mark.parametrize(
    "wrong",
    [
        {"processes": 2},
        {"parallel": "ddp"},
        {"processes": 2, "parallel": "ddp", "mode": "forward"},
        {"processes": 0},
        {"processes": 2, "parallel": "pipeline"},
    ],
)
def test_processes_that_nothing_trains_by_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"process|fsdp|ddp"):
        Case(**{"model": "DiG-S/2", "resolution": 64, **wrong})


WHOLE = make_row(
    launch=2,
    look=Look(label="DiG", markers="o", width=2.0),  # whole: of one that is not, defaults are kept
    key="ab",
    marks=("throttled",),
    timing=Timing(warmup="steady", warmup_steps=9, ci_low=1.9, ci_high=2.1, eager_ms=3.0),
    clocks=Clocks(readings=4, sm_mhz_min=1, throttled={"hw-thermal": 0.5}),
    checks=Checks(inputs="00", tokens=4096, kernels=("flash_fwd",), reference_error=0.01),
    placement=Placement(gpu=1, beside={"measuring": 1}),
    scaling=Scaling(
        run="2026", backend="nccl", ranks=(Rank(median_ms=2.0, peak=3, gpu_uuid="GPU-1"),), silent_ms=(1.0,)
    ),
)


def _leaves(value: object, path: tuple = ()) -> list[tuple]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key], (*path, key))]
    if isinstance(value, list):
        return [leaf for i in range(len(value)) for leaf in _leaves(value[i], (*path, i))]
    return [path]


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.data(), JSON_VALUES)
def test_a_field_of_another_type_is_refused_or_kept_as_it_is(data: st.DataObject, value: object) -> None:
    record = json.loads(WHOLE.to_json())
    *path, last = data.draw(st.sampled_from(_leaves(record)))
    place = record
    for step in path:
        place = place[step]
    old, place[last] = place[last], value
    try:
        row = Row.from_json(json.dumps(record))
    except ResultError:
        return
    again = json.loads(row.to_json())
    assert _same(again, record), (path, last, old)


def _same(a: object, b: object) -> bool:
    """Equal, and of the same types, but that a whole number may stand for a float."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b and (type(a) is type(b) or {type(a), type(b)} == {int, float})


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: "[" * 100_000,
        lambda line: line.replace('"launch":2', '"launch":2,"launch":3'),
        lambda line: line.replace("[2.0,", "[NaN,"),
        lambda line: line.replace("[2.0,", f"[1{'0' * 400},"),
        lambda line: line.replace('"launch":2', '"lunch":2'),
        lambda line: line.replace('"launch":2', '"launch":-2'),
        lambda line: line.replace('"options":{"backend":"fla"}', '"options":{"backend":1}'),
    ],
)
def test_lines_that_would_crash_or_mislead_a_trusting_reader(damage: Callable[[str], str]) -> None:
    line = WHOLE.to_json()
    assert damage(line) != line
    with pytest.raises(ResultError):
        Row.from_json(damage(line))


def test_a_full_disk_leaves_whole_rows_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path) as writer:
        writer.write(make_row())
        before = path.read_bytes()
        file = writer._file

        class Full:
            """Takes half of what it is given, once, and then nothing, as a disk does that fills up."""

            room = 1

            def __getattr__(self, name: str) -> object:
                return getattr(file, name)

            def write(self, content: bytes) -> int:
                if not self.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.room -= 1
                return file.write(content[: len(content) // 2])

        monkeypatch.setattr(writer, "_file", Full())
        with pytest.raises(ResultError, match="No space left on device; the rows before are whole"):
            writer.write(make_row())
        assert path.read_bytes() == before
        monkeypatch.setattr(writer, "_file", file)
        writer.write(WHOLE)
    assert read_results(path).rows == (make_row(), WHOLE)


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


def test_two_writers_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    code = "import sys, bench.store.rows as r, pathlib\ntry: r.ResultsWriter(pathlib.Path(sys.argv[1]))\n"
    code += "except r.ResultError as e: print(e)"
    with ResultsWriter(path):
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "is being written by another run" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_result_is_for_whom_the_umask_says(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        for _ in range(2):  # Anew, and in another's place.
            write_file(tmp_path / "table.md", "x")
            assert (tmp_path / "table.md").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_unwritable_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultError, match="cannot write"):
        ResultsWriter(tmp_path / "file" / "results.jsonl")


def test_the_page_on_method_names_the_schema() -> None:
    assert f"**Its schema** is version {SCHEMA}." in (ROOT / "docs" / "method.md").read_text()

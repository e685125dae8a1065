"""Every reader and every option, given what no benchmark wrote: one line, status 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from bench.cases.case import Case
from bench.cli import capacity as capacity_command
from bench.cli import kernels as kernels_command
from bench.cli import main as cli
from bench.cli import ops_compare
from bench.cli import profile as profile_command
from bench.cli import regression as regression_command
from bench.cli import sampling as sampling_command
from bench.inspect import capacity
from bench.sampling.rows import SamplingCase, SamplingRow, read_rows
from bench.store.ledgers import Checks, Clocks, Memory, Timing
from bench.store.rows import ResultError, ResultsWriter, Row, read_results
from reports import __main__ as reports_main
from reports import fashion, follow
from reports import sampling as sampling_report

QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
DRAWN = settings(QUICK, max_examples=max(10, settings.default.max_examples // 4))
"""Of inputs that figures are drawn of, which takes most of the time."""
ROW = Row(
    case=Case(model="DiG-S/2", options=(("recurrence", "fla"),), resolution=256),
    status="ok",
    started_at="2026-01-01T00:00:00+00:00",
    samples_ms=(1.0, 2.0),
    memory=Memory(parameters=4, allocator_peak=8),
    flops=10**9,
    matmul_ceiling=1e12,
    implementations={"recurrence": "fla"},
    environment={"gpu_name": "H100", "packages": {"fla": "1"}, "commit": "a" * 40, "cpu_cores": 4},
    key="k",
    timing=Timing(warmup="steady", warmup_steps=3, ci_low=1.0, ci_high=2.0),
    clocks=Clocks(readings=3, throttled={"sw-thermal": 0.5}),
    checks=Checks(inputs="x", tokens=4),
)
SAMPLE = SamplingRow(
    case=SamplingCase(model="DiG-S/2", resolution=256, batch=4), status="ok", seconds=(1.0, 2.0), run="1"
)
RUN: dict[str, Any] = {
    "config": {"model": {"name": "DiG-S/2", "options": {"recurrence": "triton"}}, "batch": 4, "dtype": "bf16"},
    "environment": {"gpu_name": "H100"},
}
EVALUATION: dict[str, Any] = {
    "metric": "distance", "features": "f", "distance": 2.0, "distance_of_data": 0.5, "samples": 10, "reference": 10,
    "of": {"step": 30, "seconds": 2.0},
}  # fmt: skip

JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e-320, 1e300, -0.0])
    | st.floats()
    | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value of a record."""
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        yield from places(inner, (*at, name))


@st.composite
def spoiled(draw: st.DrawFn, record: dict[str, Any]) -> str:
    """The record as a line, with a value somewhere replaced, removed or added."""
    content = json.loads(json.dumps(record))
    at = draw(st.sampled_from([place for place in places(content) if place]))
    parent = content
    for name in at[:-1]:
        parent = parent[name]
    what = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if what == "replace":
        parent[at[-1]] = draw(JUNK)
    elif what == "remove":
        del parent[at[-1]]
    elif isinstance(parent, dict):
        parent[draw(st.text(max_size=5))] = draw(JUNK)
    return json.dumps(content)


def clean(result: Result, *statuses: int) -> None:
    """Ended as it should: no traceback; where the input was refused, with one line."""
    assert result.exception is None or isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert result.exit_code in statuses, result.output
    if result.exit_code == 2:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        assert len(result.stderr) < 2000


def invoke(app: Any, *words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def read_by_all(path: Path, folder: Path) -> None:
    """The commands that read rows, on one file."""
    good = folder / "good.jsonl"
    good.write_text(ROW.to_json() + "\n")
    clean(invoke(cli.app, "compare", good, path), 0, 1, 2, 3)
    clean(invoke(cli.app, "compare", path, good, "--noise", "1%"), 0, 1, 2, 3)
    for format in ("csv", "parquet"):
        clean(invoke(cli.app, "export", path, "--format", format, "--out", folder / "table"), 0, 2)
    clean(invoke(reports_main.app, path, "--out", folder / "report"), 0, 2)


@DRAWN
@given(line=spoiled(json.loads(ROW.to_json())))
def test_rows_with_anything_in_them(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line.encode() + b"\n")
    read_by_all(path, tmp_path)


@QUICK
@given(line=spoiled(json.loads(SAMPLE.to_json())))
def test_sampling_rows_with_anything_in_them(line: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line.encode() + b"\n")
    clean(invoke(sampling_report.app, path, "--out", tmp_path / "out"), 0, 2)


def write_logs(folder: Path, **files: list[str]) -> None:
    for name, recurrence, dtype in (
        ("reference", "reference", "fp32"),
        ("first", "t", "bf16"),
        ("second", "t", "bf16"),
    ):
        own = folder / name
        (own / "checkpoints").mkdir(parents=True, exist_ok=True)
        model = {**RUN["config"]["model"], "options": {"recurrence": recurrence}}
        content = {**RUN, "config": {**RUN["config"], "model": model, "dtype": dtype}}
        lines = {
            "config.json": [json.dumps(content)],
            "train.jsonl": [json.dumps({"step": i, "loss": 1 / i}) for i in range(1, 31)],
            "evaluation.jsonl": [json.dumps(EVALUATION)],
            "events.jsonl": [json.dumps({"event": "started"})],
        }
        if name == "first":
            lines |= {key.replace("_", "."): value for key, value in files.items()}
        for file, content_lines in lines.items():
            (own / file).write_text("\n".join(content_lines) + "\n")
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        checkpoint = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
        (own / "checkpoints" / "step-00000030.safetensors").write_bytes(checkpoint)


@DRAWN
@given(
    spoilt=st.one_of(
        spoiled(RUN).map(lambda line: {"config_json": [line]}),
        spoiled(EVALUATION).map(lambda line: {"evaluation_jsonl": [line]}),
        spoiled({"event": "started"}).map(lambda line: {"events_jsonl": [line]}),
        spoiled({"step": 1, "loss": 1.0}).map(
            lambda line: {"train_jsonl": [line, *(json.dumps({"step": i, "loss": 1 / i}) for i in range(2, 31))]}
        ),
    )
)
def test_training_logs_with_anything_in_them(spoilt: dict[str, list[str]], tmp_path: Path) -> None:
    write_logs(tmp_path, **spoilt)
    clean(invoke(fashion.app, tmp_path), 0, 2)
    clean(invoke(follow.app, tmp_path), 0, 1, 2)


FILES: dict[str, Callable[[Path], object]] = {
    "directory": lambda path: path.mkdir(),
    "fifo": os.mkfifo,
    "html": lambda path: path.write_text("<!doctype html>\n<html><body>404</body></html>\n"),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 4 + b"\n"),
    "latin-1": lambda path: path.write_bytes(ROW.to_json().replace("H100", "caf\xe9").encode("latin-1") + b"\n"),
    "10 MB": lambda path: path.write_bytes(b"x" * 10**7 + b"\n"),
    "1 MB of JSON": lambda path: path.write_bytes(b"[" + b"0," * (5 * 10**5) + b"0]\n"),
    "deep": lambda path: path.write_text("[" * 10**5 + "\n"),
    "digits": lambda path: path.write_text('{"schema": ' + "9" * 10**5 + "}\n"),
    "empty": lambda path: path.write_text(""),
    "surrogate": lambda path: path.write_text(ROW.to_json().replace("H100", "\\ud800") + "\n"),
    "absent": lambda path: None,
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_something_else(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows[red].jsonl"
    FILES[kind](path)
    before = path.read_bytes() if path.is_file() else None
    read_by_all(path, tmp_path)
    clean(invoke(sampling_report.app, path, "--out", tmp_path / "out"), 2)
    if kind not in ("empty", "absent"):
        with pytest.raises(ResultError, match=r"cannot|line 1"):
            ResultsWriter(path)
    for name in ("config.json", "train.jsonl", "evaluation.jsonl"):
        folder = tmp_path / name
        write_logs(folder)
        (folder / "first" / name).unlink()
        FILES[kind](folder / "first" / name)
        clean(invoke(fashion.app, folder), 0, 2)
        clean(invoke(follow.app, folder), 0, 1, 2)
    assert before is None or path.read_bytes() == before


@pytest.mark.parametrize("name", ["out", "tables.md", "speed_memory.svg"])
@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_places_to_write_that_are_something_else(kind: str, name: str, tmp_path: Path) -> None:
    (good := tmp_path / "good.jsonl").write_text(ROW.to_json() + "\n")
    place = tmp_path / "a" / name
    place.parent.mkdir()
    FILES[kind](place)
    clean(invoke(cli.app, "compare", good, good, "--out", place), 2)
    clean(invoke(cli.app, "export", good, "--out", place), 2)
    if name != "out":
        clean(invoke(reports_main.app, good, "--out", place.parent), 2)
    with pytest.raises(ResultError, match="cannot write"):
        ResultsWriter(place)
    words = ["--model", "DiT-S/8", "--device", "cpu", "--limit", "1"]
    clean(invoke(cli.app, "capacity", *words, "--out", place), 2)
    clean(invoke(cli.app, "sampling", "--device", "cpu", "--out", place), 2)


def test_what_was_measured_is_never_written_over(tmp_path: Path) -> None:
    """Not by a table of it, nor by rows of another kind behind it."""
    line = ROW.to_json() + "\n"
    (rows := tmp_path / "rows.csv").write_text(line)
    (samples := tmp_path / "samples.jsonl").write_text(SAMPLE.to_json() + "\n")
    clean(invoke(cli.app, "export", rows, "--format", "csv"), 2)
    clean(invoke(cli.app, "compare", rows, rows, "--out", rows), 2)
    clean(invoke(cli.app, "capacity", "--model", "DiT-S/8", "--device", "cpu", "--limit", "1", "--out", rows), 2)
    clean(invoke(cli.app, "sampling", "--device", "cpu", "--out", rows), 2)
    clean(invoke(cli.app, "run", "--device", "cpu", "--resolution", "64", "--out", samples), 2)
    assert rows.read_text() == line
    assert read_results(rows).rows == (ROW,)
    assert read_rows(samples).rows == (SAMPLE,)


NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e309",
    "1" + "0" * 400,
    "9" * 5000,
    "2147483648",
    "x",
    "",
    "1_0",
    "٣",
    "\0",
]
RUN_WORDS = ("run", "--device", "cpu")
ONE = ("--model", "DiT-S/8", "--device", "cpu")
OPTIONS: list[tuple[Any, tuple[str, ...], tuple[str, ...]]] = [
    (cli.app, RUN_WORDS, ("--batch", "--patch", "--resolutions", "--time-limit", "--launches")),
    (cli.app, ("kernels", *ONE), ("--resolution", "--batch", "--top")),
    (cli.app, ("profile", *ONE), ("--resolution", "--batch")),
    (cli.app, ("first-step", *ONE), ("--resolution", "--batch")),
    (
        cli.app,
        ("capacity", *ONE, "--limit", "1"),
        ("--resolution", "--batch", "--limit", "--most-batch", "--most-resolution", "--time-limit"),
    ),
    (
        cli.app,
        ("regression", "--suite", "cpu", "--base", "."),
        ("--launches", "--least-effect", "--noise", "--seconds", "--time-limit", "--against-itself", "--seed"),
    ),
    (
        cli.app,
        ("sampling", "--device", "cpu"),
        ("--patch", "--resolutions", "--steps", "--cfg", "--batch", "--repeats", "--time-limit"),
    ),
    (cli.app, ("coverage",), ("--trials", "--launches")),
    (cli.app, ("ops", "gla"), ("--tokens", "--heads", "--samples", "--chunks")),
    (
        cli.app,
        ("ops", "compare", "--op", "gla", "--device", "cpu", "--base", "."),
        ("--resolution", "--batch", "--launches", "--least-effect", "--noise", "--seconds", "--time-limit", "--seed"),
    ),
]
NO_OUT = ("kernels", "first-step", "coverage", "ops")
"""Commands that write no file of their own."""


@pytest.fixture
def _measuring_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command ends with status 7 where it would begin to measure: its input was accepted."""

    def begin(*arguments: object, **named: object) -> None:
        sys.exit(7)

    for module, name in (
        (cli, "run_sweep"),
        (capacity_command, "probe_case"),
        (capacity, "run_job"),
        (kernels_command, "_print_by_time"),
        (profile_command, "profile_case"),
        (regression_command, "_OfSteps"),
        (sampling_command, "measure"),
        (ops_compare, "RegressionGate"),
    ):
        monkeypatch.setattr(module, name, begin, raising=False)
    monkeypatch.setattr("bench.inspect.profile.profile_case", begin)
    monkeypatch.setattr("bench.judge.coverage.report", begin)
    monkeypatch.setattr("bench.measure.steps.build_step", begin)


@pytest.mark.usefixtures("_measuring_nothing")
@pytest.mark.parametrize(("app", "words", "option"), [(a, w, o) for a, w, options in OPTIONS for o in options])
def test_numbers_outside_their_range(app: Any, words: tuple[str, ...], option: str, tmp_path: Path) -> None:
    out = () if words[0] in NO_OUT else ("--out", str(tmp_path / "out" / "x"))
    for value in NUMBERS:
        result = invoke(app, *words, *out, f"{option}={value}")
        accepted = (option, value) in {("--against-itself", "0"), ("--seed", "0"), ("--cfg", "0"), ("--cfg", "-1")}
        accepted |= value in ("1_0", "٣")  # Python reads them as 10 and 3
        clean(result, *((2, 7) if accepted else (2,)))


@pytest.mark.usefixtures("_measuring_nothing")
@QUICK
@given(data=st.data())
def test_options_with_anything_in_them(data: st.DataObject, tmp_path: Path) -> None:
    app, words, options = data.draw(st.sampled_from(OPTIONS))
    others = ("--models", "--sizes", "--modes", "--model", "--suite", "--dtype", "--device", "--execution", "--nothing")
    given = data.draw(st.dictionaries(st.sampled_from([*options, *others]), TEXT, min_size=1, max_size=3))
    out = () if words[0] in NO_OUT else ("--out", str(tmp_path / "out" / "x"))
    clean(invoke(app, *words, *out, *(f"{option}={value}" for option, value in given.items())), 2, 7)


TEXT = (
    st.text(string.printable, max_size=12)
    | st.text(st.characters(codec="utf-8"), max_size=12)
    | st.floats().map(str)
    | st.integers().map(str)
)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["kernels", "profile", "first-step"])
def test_a_size_beyond_memory_is_one_line_and_leaves_nothing(command: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")] if command == "profile" else []
    words = [sys.executable, "-m", "bench", command, *ONE, "--resolution", "1048576", "--mode", "forward", *out]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: DiT-S/8")
    assert "does not fit in memory; choose a smaller --batch or --resolution" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_values_that_stand_twice_are_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swept = []
    monkeypatch.setattr(cli, "run_sweep", lambda sweep, *args, **named: swept.extend(sweep.remaining) or iter(()))
    words = ["--models", "DiT,DiT,DiT:materialized", "--modes", "train", "--resolutions", "64,128,64"]
    result = invoke(cli.app, "run", "--device", "cpu", *words, "--out", tmp_path / "rows.jsonl")
    assert result.exit_code == 0, result.output
    assert [launch.case.resolution for launch in swept] == [64, 128]
    assert "64 stands 2 times in 64,128,64; it counts once" in result.stderr

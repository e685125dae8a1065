from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reports.__main__ import OTHERS, app, main
from tests.reports.conftest import GPU

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def one_line(result):
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def sizes(make_row):
    return [make_row(f"DiG-{size}/2", mode=mode) for size in "SB" for mode in ("train", "forward")]


def test_writes_figures_and_tables_and_says_so(sizes, write_rows, tmp_path):
    out = tmp_path / "new" / "folder"
    result = run(write_rows(sizes), "--out", out, "--title", "A title of my own")
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    assert written == {"speed_memory.png", "speed_memory.svg", "model_size.png", "model_size.svg", "tables.md"}
    assert all(f"wrote {out / name}" in result.stdout for name in written)
    assert (out / "tables.md").read_text().startswith("# A title of my own\n")


def test_a_second_run_writes_the_same_bytes(sizes, write_rows, tmp_path):
    path = write_rows(sizes)
    for name in ("a", "b"):
        assert run(path, "--out", tmp_path / name).exit_code == 0
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_several_files_are_merged(make_row, write_rows, tmp_path):
    paths = [write_rows([make_row(f"{f}-S/2")], f"{f}.jsonl") for f in ("DiG", "DiT")]
    assert run(*paths, "--out", tmp_path).exit_code == 0
    assert "| resolution | DiG | DiT |" in (tmp_path / "tables.md").read_text()


def test_a_figure_without_rows_is_not_written_and_said(make_row, write_rows, tmp_path):
    out = tmp_path / "out"
    result = run(write_rows([make_row()]), "--out", out)
    assert result.exit_code == 0
    assert "did not write model_size: no resolution at which two sizes were timed\n" in result.stdout
    assert not list(out.glob("model_size.*"))


def test_an_older_figure_is_named_where_none_is_written(make_row, write_rows, tmp_path):
    (tmp_path / "model_size.svg").touch()
    result = run(write_rows([make_row()]), "--out", tmp_path)
    assert "model_size.svg there is from an earlier run" in result.stdout


def test_rows_that_all_failed_make_tables_only(make_row, write_rows, tmp_path):
    out = tmp_path / "out"
    result = run(write_rows([make_row(status="oom")]), "--out", out)
    assert result.exit_code == 0
    assert [path.name for path in out.iterdir()] == ["tables.md"]
    assert "| 1024 | OOM |" in (out / "tables.md").read_text()


def test_left_out_rows_are_printed(make_row, write_rows, tmp_path):
    rows = [make_row(), make_row(resolution=2048), make_row(environment={"gpu_name": "NVIDIA H200"})]
    result = run(write_rows(rows), "--out", tmp_path)
    assert "left out: NVIDIA H200, training step, CUDA graph, bf16, batch 1 (1 row)" in result.stdout


def test_a_torn_last_line_is_warned_about(make_row, write_rows, tmp_path):
    path = write_rows([make_row()])
    path.write_bytes(path.read_bytes() + b'{"schema"')
    result = run(path, "--out", tmp_path)
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {path}: the last line is torn")


def test_no_such_file(tmp_path):
    path = tmp_path / "none.jsonl"
    assert one_line(run(path, "--out", tmp_path)) == f"error: cannot read {path}: No such file or directory"


def test_no_rows(write_rows, tmp_path):
    path = write_rows([])
    assert one_line(run(path, "--out", tmp_path)) == f"error: no rows in {path}; run the benchmark first"


def test_a_line_that_is_no_row(make_row, write_rows, tmp_path):
    path = write_rows([make_row()])
    path.write_text(path.read_text() + "nonsense\n")
    assert one_line(run(path, "--out", tmp_path)).startswith(f"error: {path}, line 2: not JSON")


def test_out_is_a_file(make_row, write_rows, tmp_path):
    path = write_rows([make_row()])
    assert one_line(run(path, "--out", path)) == f"error: cannot write {path}: File exists; choose another --out"


def test_arguments_are_required(make_row, write_rows):
    assert run("--out", "x").exit_code == 2
    assert run(write_rows([make_row()])).exit_code == 2


def test_reports_need_no_torch():
    code = "import sys, reports.__main__; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_runs_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "reports", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python -m reports" in result.stdout
    assert "RESULTS.jsonl" in result.stdout


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_report_is_reached_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"python -m reports {name} [OPTIONS]" in " ".join(capsys.readouterr().out.split())


def test_rows_that_do_not_count_are_counted(make_row, write_rows, tmp_path):
    old = [make_row(ms=10.0, launch=i, key="old") for i in range(3)]
    path = write_rows([*old, make_row(ms=5.0, key="new"), make_row(ms=6.0, key="new")])
    result = CliRunner().invoke(app, [str(path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (
        "rows left out: 3 of older code, versions or circumstances, 1 of launches that were measured" in result.output
    )


def test_a_misspelt_report_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["histroy", "out.jsonl"])
    assert ended.value.code == 2
    assert "no file and no report 'histroy': did you mean history?" in capsys.readouterr().err


ALIEN = ('{"a": 1}', '{"kind": "something"}', '{"schema": 6}', "[1]", "3")
READERS = {
    "reports": ("--out", "OUT"),
    "ablation": ("--out", "OUT"),
    "claims": (),
    "history": ("--case", "DiG-S/2@1024", "--out", "OUT"),
    "page": ("--out", "OUT"),
    "sampling": ("--out", "OUT"),
    "scaling": (),
}
"""Reports that read files of rows, and the other options they need."""


@pytest.mark.parametrize("line", ALIEN)
@pytest.mark.parametrize("name", READERS)
def test_json_that_is_no_row_is_refused_in_one_line(name, line, capsys, tmp_path):
    path = tmp_path / "alien.jsonl"
    path.write_text(line + "\n")
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[name]]
    with pytest.raises(SystemExit) as ended:
        main([*([] if name == "reports" else [name]), str(path), *words])
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    (told,) = said.err.splitlines()
    assert told.startswith(f"error: {path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["claims", "history"])
def test_beside_rows_too(name, make_row, write_rows, capsys, tmp_path):
    (alien := tmp_path / "alien.jsonl").write_text(ALIEN[0] + "\n")
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[name]]
    with pytest.raises(SystemExit) as ended:
        main([name, str(write_rows([make_row()], "own.jsonl")), str(alien), *words])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {alien}: its first line is no row")


@pytest.mark.parametrize("name", ["claims", "history"])
def test_rows_of_other_kinds_and_torn_lines_are_no_error(name, make_row, write_rows, capsys, tmp_path):
    own = write_rows([make_row(ms=ms, environment={**GPU, "commit": str(ms)}) for ms in (9.0, 9.1)], "own.jsonl")
    own.write_text(own.read_text() + '{"a": 1}')
    others = [ROOT / "results" / "h100" / f"{kind}.jsonl" for kind in ("capacity", "sampling", "ablation")]
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[name]]
    with pytest.raises(SystemExit) as ended:
        main([name, str(own), *map(str, others), *words])
    assert ended.value.code == 0, capsys.readouterr().err


def test_of_a_folder_claims_leave_other_files_alone(make_row, write_rows, capsys, tmp_path):
    write_rows([make_row()], "own.jsonl")
    (tmp_path / "alien.jsonl").write_text(ALIEN[0] + "\n")
    with pytest.raises(SystemExit) as ended:
        main(["claims", str(tmp_path)])
    assert ended.value.code == 0
    assert capsys.readouterr().err == "no claim reads alien.jsonl\n"

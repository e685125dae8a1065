"""The command line: bad input ends with status 2 and one message, before any work."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cases.case import Case
from bench.cases.suites import cpu_suite
from bench.cli import capacity as capacity_command
from bench.cli import main as cli
from bench.inspect.capacity import Probe
from bench.store.rows import read_results
from dig.environment import ROOT

runner = CliRunner()


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "gpu_present", lambda: False)
    monkeypatch.setattr(cli, "run_sweep", lambda *args, **kwargs: pytest.fail("measured although the input is bad"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "Dig"], "unknown model 'Dig': did you mean DiG?"),
        (["--models", "DiG:flash"], "did you mean fla?"),
        (["--sizes", "XXL"], "unknown --sizes 'XXL' of DiG: did you mean XL?"),
        (["--patch", "3"], "--patch must be one of 2, 4, 8; got 3"),
        (["--resolution", "100"], "resolution 100 is not a multiple of 16"),
        (["--resolution", "big"], "--resolutions takes whole numbers"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--time-limit", "0"], "--time-limit must be positive"),
        (["--modes", "tain"], "unknown --modes 'tain': did you mean train?"),
        (["--modes", ""], "--modes needs at least one of train, forward"),
        (["--weights", "fp8"], "unknown --weights 'fp8'"),
        (["--executions", "x"], "unknown --executions 'x'"),
        (["--executions", ""], "--executions needs at least one of eager"),
        (["--compile-scope", "x"], "unknown --compile-scope 'x': Known: block, model"),
        (["--compile-scope", ""], "unknown --compile-scope '': Known: block, model"),
        (["--executions", "graph"], "needs a GPU"),
        (["--device", "cuda"], "no NVIDIA GPU was found"),
        (["--device", "tpu"], "unknown --device 'tpu': choose auto, cuda or cpu"),
        (["--dtype", "fp8"], "unknown --dtype 'fp8'"),
        (["--dtype", ""], "unknown --dtype ''"),
        (["--suite", "papers"], "unknown --suite 'papers': did you mean paper?"),
        (["--suite", ""], "unknown --suite '': Known: auto, paper, best, cpu"),
        (["--suite", "paper"], "needs an NVIDIA GPU"),
        (["--suite", "best"], "the suite best needs an NVIDIA GPU"),
        (["--models", ""], "nothing to measure"),
        (["--models", "DiG:fla"], "DiG runs on a CPU with reference only"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path) -> None:
    result = runner.invoke(cli.app, ["run", *options, "--out", str(tmp_path / "results.jsonl")])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--models", "nonsense"],
        ["--sizes", "S"],
        ["--patch", "3"],
        ["--resolutions", "7"],
        ["--modes", "train,forward"],
        ["--batch", "1"],
        ["--executions", ""],
        ["--compile-scope", "model"],
        ["--max-autotune"],
        ["--dtype", "fp32"],
        ["--weights", "bf16"],
    ],
)
def test_a_suite_takes_no_axes(options: list[str], tmp_path: Path) -> None:
    """Those that name a default, too: whoever types one means it."""
    result = runner.invoke(cli.app, ["run", "--suite", "cpu", *options, "--out", str(tmp_path / "results.jsonl")])
    assert result.exit_code == 2, result.output
    assert result.output.startswith(f"error: {options[0]}: --suite cpu has cases of its own")
    assert result.output.count("\n") == 1


def test_every_option_of_what_is_measured_is_an_axis_or_no_case_hangs_on_it() -> None:
    (run,) = (info.callback for info in cli.app.registered_commands if info.callback is cli.run)
    others = "suite device out resume ahead prepare_limit time_limit launches dry_run quiet gpus alone spread ctx"
    assert {*cli.AXES, *others.split()} == set(inspect.signature(run).parameters)


def test_a_suite_alone_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Case] = []
    monkeypatch.setattr(cli, "_run", lambda cases, **_: found.extend(cases))
    options = ["--device", "cpu", "--launches", "2", "--resume", "--out", str(tmp_path / "results.jsonl")]
    assert runner.invoke(cli.app, ["run", "--suite", "auto", *options]).exit_code == 0
    assert found == cpu_suite()


@pytest.mark.parametrize(("weights", "said"), [("bf16", True), ("fp32,bf16", False)])
def test_training_that_bf16_weights_leave_out_is_said(weights: str, said: bool, tmp_path: Path) -> None:
    options = ["--models", "DiT", "--resolution", "64", "--dtype", "bf16", "--out", str(tmp_path / "a.jsonl")]
    result = runner.invoke(cli.app, ["run", "--weights", weights, "--dry-run", *options])
    assert result.exit_code == 0, result.output
    assert ("training steps are left out" in result.output) == said


def test_what_a_compilation_covers_is_asked_of_compiled_executions(tmp_path: Path) -> None:
    options = [
        "--models",
        "DiT",
        "--resolution",
        "64",
        "--compile-scope",
        "block",
        "--out",
        str(tmp_path / "rows.jsonl"),
    ]
    result = runner.invoke(cli.app, ["run", "--executions", "eager", *options])
    assert result.exit_code == 2
    assert result.output.startswith("error: --compile-scope is of compiled executions; these are eager: add compile")
    assert runner.invoke(cli.app, ["run", "--executions", "eager,compile", "--dry-run", *options]).exit_code == 0


def test_what_tunes_itself_is_measured_last_by_axes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Case] = []
    monkeypatch.setattr(cli, "gpu_present", lambda: True)
    monkeypatch.setattr(cli, "_require_packages", lambda cases: None)
    monkeypatch.setattr(cli, "_run", lambda cases, **_: found.extend(cases))
    options = ["--models", "DiG:fla,Flash-DiT", "--modes", "forward", "--out", str(tmp_path / "results.jsonl")]
    result = runner.invoke(cli.app, ["run", *options])
    assert result.exit_code == 0, result.output
    assert [case.model for case in found] == ["Flash-DiT-S/2", "DiG-S/2"]


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "gpu_present", lambda: True)
    result = runner.invoke(cli.app, ["run", "--models", "DiS:mamba-ssm", "--out", str(tmp_path / "results.jsonl")])
    assert result.exit_code == 2
    assert "pip install 'dig-diffusion[gpu-built]'" in result.output


def test_unwritable_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = runner.invoke(cli.app, ["run", "--resolution", "64", "--out", str(tmp_path / "file" / "results.jsonl")])
    assert result.exit_code == 2
    assert "cannot write" in result.output


def test_torn_line_is_reported_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run_sweep", lambda *args, **kwargs: iter(()))
    path = tmp_path / "results.jsonl"
    path.write_text('{"schema":1,"case"')
    result = runner.invoke(cli.app, ["run", "--resolution", "64", "--out", str(path), "--resume"])
    assert result.exit_code == 0, result.output
    assert "ended inside a row" in result.output
    assert path.read_text() == ""
    assert (tmp_path / "results.jsonl.torn").read_text() == '{"schema":1,"case"\n'


def test_the_command_line_starts_without_torch() -> None:
    code = "import bench.cli.main, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    command = [sys.executable, "-m", "bench", "run", "--models", "DiT", "--patch", "8", "--resolution", "64"]
    command += ["--modes", "forward", "--device", "cpu", "--out", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "img/s" in done.stderr
    (row,) = read_results(path).rows
    assert row.status == "ok"


@pytest.mark.slow
def test_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every family; the counts of all sizes are looked at in test_flops."""
    monkeypatch.setenv("COLUMNS", "200")
    names = ["DiG-S", "DiT-S", "Flash-DiT-S", "DiS-S", "DiS-XL"]
    listed = runner.invoke(cli.app, ["list", *names])
    assert listed.exit_code == 0, listed.output
    assert all(f"{name}/{patch}" in listed.stdout for name in names for patch in (2, 4, 8))
    assert "32,983,328" not in listed.stdout  # the default variant is the paper's
    assert "DiS-XL/2 (assumed)" in listed.stdout
    assert "1.403" in listed.stdout


def test_a_list_of_some_models() -> None:
    listed = runner.invoke(cli.app, ["list", "DiT-XL", "Flash-DiT-S/8"])
    assert listed.exit_code == 0, listed.output
    names = [line.split()[1] for line in listed.stdout.splitlines() if line.startswith("│")]
    assert names == ["DiT-XL/2", "DiT-XL/4", "DiT-XL/8", "Flash-DiT-S/8"]
    assert "DiT: backend" in listed.stdout
    assert "DiS: backend" not in listed.stdout
    wrong = runner.invoke(cli.app, ["list", "DiX-S"])
    assert wrong.exit_code == 2
    assert "no model begins with 'DiX-S': did you mean Di" in " ".join(wrong.output.split())


@pytest.mark.usefixtures("shallow")
def test_kernels_of_a_step() -> None:
    options = ["--model", "DiG-S/8", "--resolution", "64", "--mode", "forward", "--device", "cpu"]
    done = runner.invoke(cli.app, ["kernels", *options])
    assert done.exit_code == 0, done.output
    assert "DiG-S/8" in done.stdout
    assert "aten::addmm" in done.stdout
    assert "share" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "Dig-S/2"], "did you mean DiG?"),
        (["--model", "DiG-S/2", "--resolution", "100"], "not a multiple of 16"),
        (["--model", "DiG-S/2", "--device", "cpu", "--in-order"], "leave it out on a CPU"),
    ],
)
def test_kernels_refuses_bad_input(options: list[str], message: str) -> None:
    result = runner.invoke(cli.app, ["kernels", *options])
    assert result.exit_code == 2
    assert message in result.output


def test_capacity_keeps_every_probe_with_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(case: Case, *, limit: int | None, time_limit: float) -> Probe:
        peak = case.batch * case.resolution**2 << 10
        return Probe(case=case, fits=peak <= limit, peak=peak if peak <= limit else None)

    monkeypatch.setattr(capacity_command, "probe_case", probe)
    out = tmp_path / "probes.jsonl"
    words = ["capacity", "--model", "DiG-S/2:reference", "--device", "cpu", "--limit", "1", "--resolution", "512"]
    result = runner.invoke(cli.app, [*words, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "largest batch at 512px: 4" in result.output
    assert "largest resolution at batch 1: 1024" in result.output
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(records) == result.output.count("px batch ")
    fits = [r["case"]["batch"] for r in records if r["fits"] and r["case"]["resolution"] == 512]
    assert max(fits) == 4
    for record in records:
        assert record["case"]["options"] == {"backend": "reference"}
        assert record["environment"]["python"]
        assert record["limit"] == 1 << 30


def test_there_is_one_command_line() -> None:
    """All is reached by ``python -m bench``; the two other modules that run are the sides of a comparison."""
    found = {path.relative_to(ROOT / "bench").as_posix(): path.read_text() for path in (ROOT / "bench").rglob("*.py")}
    assert {name for name, text in found.items() if "__main__" in text} == {"__main__.py", "run/side.py", "ops/side.py"}
    assert [name for name, text in found.items() if "argparse" in text] == []

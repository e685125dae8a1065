"""The figure of training runs: what it draws is what the logs say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reports.fashion import RunError, app, draw, read_runs
from tests.dig.tiny import make_fashion
from tests.reports.test_report_follow import ROOT, tiny_python


def write_run(folder: Path, model: str, **evaluation: Any) -> Path:
    folder.mkdir(parents=True)
    config = {"model": {"name": model, "options": {"backend": "triton", "variant": "paper"}}, "batch": 256}
    (folder / "config.json").write_text(json.dumps({"config": config, "environment": {"gpu_name": "H100"}}))
    events = [{"event": "started", "step": 0}, {"event": "resumed", "step": 300}, {"event": "finished", "step": 1200}]
    log = [{"step": 20 * (i + 1), "loss": 1 / (i + 1)} for i in range(60)]
    rows = [
        {"metric": "Fréchet distance of the classifier", "features": "classifier 1", "distance": 40.0 - i,
         "distance_of_data": 0.5, "samples": 10_000, "reference": 10_000,
         "of": {"step": 300 * (i + 1), "seconds": 9.5 * (i + 1)}, **evaluation}
        for i in (1, 0, 2, 3)
    ]  # fmt: skip
    for name, lines in (("events", events), ("train", log), ("evaluation", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_figure_draws_the_logs(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "DiG-S/2")
    write_run(tmp_path / "b", "Flash-DiT-S/2")
    runs = read_runs(tmp_path)
    assert [run.interruptions for run in runs] == [1, 1]
    figure = draw(runs).figure
    loss, by_step, by_time = figure.axes
    drawn = {line.get_gid(): line for line in by_time.get_lines()}
    assert list(drawn["line:Flash-DiT-S/2"].get_xdata()) == [9.5, 19, 28.5, 38]
    assert list(drawn["line:DiG-S/2"].get_ydata()) == [40, 39, 38, 37]
    assert list(by_step.get_lines()[0].get_xdata()) == [300, 600, 900, 1200]
    windows = loss.get_lines()[0]
    assert len(windows.get_xdata()) == 20
    assert windows.get_ydata()[0] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    words = " ".join(text.get_text() for text in figure.texts)
    assert "backend=triton, once interrupted" in words
    assert "Two halves of the data are 0.5 apart" in words
    assert "FID" not in words


def test_counts_of_samples_are_not_mixed(tmp_path: Path) -> None:
    """The curve is of the number that all checkpoints have; the last one's larger number is told in words."""
    file = write_run(tmp_path / "a", "DiG-S/2") / "evaluation.jsonl"
    last = json.loads(file.read_text().splitlines()[-1])
    with file.open("a") as stream:
        stream.write(json.dumps({**last, "samples": 50_000, "distance": 1.25}) + "\n")
    figure = draw(read_runs(tmp_path)).figure
    assert list(figure.axes[1].get_lines()[0].get_ydata()) == [40, 39, 38, 37]
    words = " ".join(" ".join(text.get_text() for text in figure.texts).split())
    assert "of 10,000 samples from" in words
    assert "Also measured: DiG-S/2 1.25 at step 1,200 (50,000 samples)" in words
    write_run(tmp_path / "b", "DiT-S/2", samples=500)
    with pytest.raises(RunError, match="was not measured with"):
        draw(read_runs(tmp_path))


@pytest.mark.slow
def test_the_script_goes_on_from_its_report(tmp_path: Path) -> None:
    """Kill, resume, measure, draw, with a tiny model; on another machine, what the report holds is not done again."""
    data = make_fashion(tmp_path / "data", train=100, test=60)
    settings = {"STEPS": "80", "BATCH": "8", "SAMPLES": "30", "EARLY": "20", "EXECUTION": "eager", "KILL_AFTER": "0"}
    settings |= {"PATIENCE": "20"}
    environment = {**os.environ, **settings, "MODELS": "DiG-S/8", "PYTHON": str(tiny_python(tmp_path))}

    def run(out: Path) -> str:
        done = subprocess.run(
            ["bash", "examples/fashion.sh", str(data), str(out)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "killed; going on" in run(tmp_path / "out")
    report = tmp_path / "out" / "report"
    rows = [json.loads(line) for line in (report / "DiG-S" / "evaluation.jsonl").read_text().splitlines()]
    assert [(row["of"]["step"], row["samples"]) for row in rows] == [
        (20, 20),
        (40, 20),
        (60, 20),
        (80, 20),
        (80, 30),
    ]
    assert {row["reference"] for row in rows} == {30}
    assert [run.interruptions for run in read_runs(report)] == [1]
    assert (report / "DiG-S" / "guided.png").exists()
    assert CliRunner().invoke(app, [str(report)]).exit_code == 0
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "report.tgz").write_bytes((tmp_path / "out" / "report.tgz").read_bytes())
    said = run(moved)
    assert "training" not in said
    assert "classifier" not in said
    assert (moved / "report" / "classifier.safetensors").exists()


def test_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "DiG-S/2")
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code == 0
    first = (tmp_path / "training.svg").read_bytes()
    assert CliRunner().invoke(app, [str(tmp_path)]).exit_code == 0
    assert (tmp_path / "training.svg").read_bytes() == first
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_bad_input(tmp_path: Path) -> None:
    def message() -> str:
        result = CliRunner().invoke(app, [str(tmp_path)])
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        return result.output

    assert "holds no run" in message()
    run = write_run(tmp_path / "a", "DiG-S/2")
    write_run(tmp_path / "b", "DiT-S/2", features="classifier 2")
    assert "different features" in message()
    (run / "train.jsonl").write_text("{")
    assert "train.jsonl, line 1: not JSON" in message()
    (run / "evaluation.jsonl").unlink()
    assert "cannot read" in message()
    (run / "config.json").write_text("{}")
    assert "config.json: config must be an object" in message()


def test_the_figure_needs_no_torch() -> None:
    code = "import reports.fashion, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

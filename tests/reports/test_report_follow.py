"""The report on two implementations: made-up logs with a known distance, and the script whole on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from reports.follow import BOUND, WINDOW, app, draw, judge, moving_average, read_logs
from tests.dig.tiny import make_fashion

ROOT = Path(__file__).resolve().parents[2]


def write_run(
    folder: Path, losses: Any, recurrence: str = "triton", dtype: str = "bf16", weight: float = 1.0, **config: Any
) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    options = {"backend": recurrence, "variant": "paper"}
    content = {"model": {"name": "DiG-S/2", "options": options}, "dtype": dtype, "batch": 32, **config}
    (folder / "config.json").write_text(json.dumps({"config": content, "environment": {"gpu_name": "H100"}}))
    lines = [json.dumps({"step": i, "loss": float(loss)}) for i, loss in enumerate(losses, 1)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    tensors = {"model.a": torch.tensor([weight, 2.0]), "model.b": torch.zeros(3, dtype=torch.int64)}
    header = {"dig": folder.name}  # as in a real one, something that differs and is no tensor
    save_file(tensors, folder / "checkpoints" / "step-00000300.safetensors", header)


def curve(steps: int = 300) -> Any:
    return 0.2 + np.exp(-np.arange(steps) / 50) + 0.05 * np.random.Generator(np.random.Philox(0)).standard_normal(steps)


def write_runs(folder: Path, first: Any = None, second: Any = None, **second_fields: Any) -> Path:
    losses = curve()
    first = losses if first is None else first
    write_run(folder / "reference", losses, "reference", "fp32")
    write_run(folder / "first", first)
    write_run(folder / "second", first if second is None else second, **second_fields)
    return folder


def run(folder: Path) -> Any:
    return CliRunner().invoke(app, [str(folder)])


def test_the_moving_average() -> None:
    assert moving_average(np.arange(5.0), 3).tolist() == [1, 2, 3]


def test_equal_runs_pass(tmp_path: Path) -> None:
    result = run(write_runs(tmp_path))
    assert result.exit_code == 0, result.output
    assert "at most 0.000% apart" in result.output
    assert "losses identical" in result.output
    assert "checkpoints: identical" in result.output
    assert (tmp_path / "follow.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "follow.json").read_text())
    assert (content["steps"], content["deviation"], content["tensors"], content["bound"]) == (300, 0, 0, 0.02)


@pytest.mark.parametrize("shift", [0.0, 0.001, 0.5])
def test_the_bound_is_to_be_seen_however_far_the_runs_are_from_it(shift: float, tmp_path: Path) -> None:
    logs = read_logs(write_runs(tmp_path, curve() * (1 + shift)))
    axis = draw(logs, judge(logs, [])).figure.axes[1]
    low, high = axis.get_ylim()
    assert low < BOUND < high


@pytest.mark.parametrize(("shift", "code"), [(0.019, 0), (0.021, 1)])
def test_the_bound_is_on_the_average(shift: float, code: int, tmp_path: Path) -> None:
    """Steps far off that cancel out in every window pass; a shift of the window's mean by 2.1% doesn't."""
    losses = curve()
    noisy = losses * (1 + shift)
    noisy[0::2] += 0.1
    noisy[1::2] -= 0.1
    result = run(write_runs(tmp_path, first=noisy))
    assert result.exit_code == code, result.output
    assert f"{shift:.3%} apart" in result.output


def test_where_it_is_worst(tmp_path: Path) -> None:
    losses = curve()
    losses[200] += 40.0
    result = run(write_runs(tmp_path, first=losses))
    assert result.exit_code == 1
    found = json.loads((tmp_path / "follow.json").read_text())["deviation_step"]
    assert 201 <= found <= 200 + WINDOW


def test_a_bit_is_enough(tmp_path: Path) -> None:
    losses = curve()
    other = losses.copy()
    other[299] = np.nextafter(other[299], 1)
    result = run(write_runs(tmp_path / "losses", second=other))
    assert result.exit_code == 1
    assert "losses DIFFERENT" in result.output
    result = run(write_runs(tmp_path / "weights", weight=1 + 2**-23))
    assert result.exit_code == 1
    assert "1 DIFFERENT: model.a" in result.output


def test_losses_that_are_no_numbers_fail(tmp_path: Path) -> None:
    losses = curve()
    losses[250:] = np.nan
    result = run(write_runs(tmp_path, first=losses))
    assert result.exit_code == 1
    assert json.loads((tmp_path / "follow.json").read_text())["deviation"] is None


def test_bad_input(tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        result = run(folder)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output
        return str(result.output)

    assert "cannot read" in message(tmp_path)
    assert "differ in more than" in message(other_data(tmp_path / "a"))
    assert "not the same run twice" in message(write_runs(tmp_path / "b", batch=16))
    folder = write_runs(tmp_path / "c")
    (folder / "second" / "train.jsonl").write_text('{"step": 1, "loss": 1}\n')
    assert "same steps" in message(folder)
    (folder / "second" / "train.jsonl").write_text('{"step": 50, "loss": 1}\n')
    assert "--log-every 1" in message(folder)
    folder = write_runs(tmp_path / "d")
    file = folder / "second" / "checkpoints" / "step-00000300.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "cut off" in message(folder)
    file.unlink()
    assert "no checkpoint" in message(folder)


def other_data(folder: Path) -> Path:
    write_run(folder / "reference", curve(), "reference", "fp32", batch=16)
    write_run(folder / "first", curve())
    write_run(folder / "second", curve())
    return folder


def test_it_needs_no_torch() -> None:
    code = "import reports.follow, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def tiny_python(folder: Path) -> Path:
    """A ``python`` whose ``-m dig`` has models small enough for a test."""
    path = folder / "python"
    path.write_text(
        '#!/bin/sh\nif [ "$1 $2" = "-m dig" ]; then shift 2; set -- -m tests.dig.tiny "$@"; fi\n'
        f'exec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_the_script(tmp_path: Path) -> None:
    """Training three times on the CPU, bf16 beside fp32, and the report."""
    data = make_fashion(tmp_path / "data")
    settings = {"MODEL": "DiG-S/8", "IMPLEMENTATION": "reference", "EXECUTION": "eager", "STEPS": "24", "BATCH": "8"}
    done = subprocess.run(
        ["bash", "examples/follow.sh", str(data), str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, **settings, "PYTHON": str(tiny_python(tmp_path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DiG-S/8, reference, bf16 against DiG-S/8, reference, fp32, 24 steps" in done.stdout
    content = json.loads((tmp_path / "out" / "report" / "follow.json").read_text())
    assert 0 < content["deviation"] < 0.02
    assert content["losses_identical"]
    assert (tmp_path / "out" / "report.tgz").stat().st_size > 0

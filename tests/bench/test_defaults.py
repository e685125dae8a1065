"""What commands measure where nobody says what: something that the machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.cli import first_step, main, sampling
from bench.cli.main import app

runner = CliRunner()


@pytest.mark.parametrize(
    ("gpu", "given", "expected"),
    [
        (False, [], {128}),
        (True, [], {1024}),
        (False, ["--resolution", "64"], {64}),
        (True, ["--resolutions", "512"], {512}),
    ],
)
def test_run(gpu: bool, given: list[str], expected: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    monkeypatch.setattr(main, "gpu_present", lambda: gpu)
    monkeypatch.setattr(main, "_run", lambda cases, **_: found.extend(cases))
    result = runner.invoke(app, ["run", *given])
    assert result.exit_code == 0, result.output
    assert {case.resolution for case in found} == expected
    assert {case.family for case in found} == {"DiG", "DiT", "Flash-DiT", "DiS"}
    assert {case.mode for case in found} == {"train", "forward"}
    assert {case.device for case in found} == {"cuda" if gpu else "cpu"}


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [(False, ("DiG-S/2", "reference", 128)), (True, ("DiG-S/2", "triton", 1792))],
)
def test_first_step(gpu: bool, expected: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):  # noqa: N818
        pass

    def stop(case: Any) -> None:
        assert (case.model, dict(case.options)["backend"], case.resolution) == expected
        raise Stop

    monkeypatch.setattr("bench.cases.choices.gpu_present", lambda: gpu)
    monkeypatch.setattr(first_step, "fitting", stop)
    assert isinstance(runner.invoke(app, ["first-step"]).exception, Stop)


@pytest.mark.parametrize("command", ["kernels", "profile"])
def test_one_model(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    found: list[int] = []

    def stop(case: Any) -> None:
        found.append(case.resolution)
        raise SystemExit

    monkeypatch.setattr(importlib.import_module(f"bench.cli.{command}"), "fitting", stop)
    runner.invoke(app, [command, "--model", "DiG-S/2", "--device", "cpu"])
    assert found == [128]


def test_sampling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Any] = []

    def measure(groups: Any, **_: Any) -> Any:
        found.extend(case for group in groups for case in group)
        raise KeyboardInterrupt

    monkeypatch.setattr(sampling, "measure", measure)
    runner.invoke(app, ["sampling", "--device", "cpu", "--out", str(tmp_path / "s.jsonl")])
    assert found
    assert {(case.model.rpartition("-")[2], case.resolution, case.batch) for case in found} == {("S/2", 64, 4)}

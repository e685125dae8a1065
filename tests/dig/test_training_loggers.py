"""Loggers behind one option, wandb by a module that only remembers."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dig.cli import app
from tests.dig.test_training import lines, train

pytestmark = pytest.mark.usefixtures("tiny_dig")
GRIDS = ["--grid-every", "2", "--grid-steps", "1"]


class FakeWandb(ModuleType):
    """Takes what wandb's module would."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None, origin="fake")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails_from = 10**6
        self.refuses = False

    def init(self, **options: Any) -> FakeWandb:
        if self.refuses:
            raise RuntimeError("api_key not configured\n(no-tty). call wandb.login")
        self.runs.append(options)
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        if step >= self.fails_from:
            raise ConnectionError("the network is gone")
        self.logged.append((step, values))

    def Image(self, pixels: Any) -> Any:  # noqa: N802 (wandb's name)
        return pixels

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_wandb_gets_what_the_lines_have(wandb: FakeWandb, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(data, run, "--steps", "3", "--log", "jsonl, wandb", *GRIDS)
    assert result.exit_code == 0, result.output
    (options,) = wandb.runs
    assert (options["mode"], options["project"], options["dir"], options["name"]) == ("offline", "dig", str(run), "run")
    assert options["config"]["batch"] == 8
    figures = {step: values for step, values in wandb.logged if "train/loss" in values}
    assert [figures[line["step"]]["train/loss"] for line in lines(run)] == [line["loss"] for line in lines(run)]
    assert "train/memory_gib" not in figures[1]  # there is none on a CPU
    ((step, values),) = [entry for entry in wandb.logged if "samples" in entry[1]]
    assert step == 2
    assert values["samples"].dtype == np.uint8
    assert wandb.finished == 1
    assert not (run / "tensorboard").exists()


def test_a_run_that_goes_on_keeps_its_id(wandb: FakeWandb, data: Path, tmp_path: Path) -> None:
    for steps in ("2", "4"):
        assert train(data, tmp_path / "run", "--steps", steps, "--log", "wandb").exit_code == 0
    first, second = wandb.runs
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert [step for step, _ in wandb.logged] == [1, 2, 3, 4]
    assert train(data, tmp_path / "other", "--steps", "1", "--log", "wandb").exit_code == 0
    assert wandb.runs[-1]["id"] != first["id"]
    # Nobody asked for lines.
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_the_users_mode_stands(wandb: FakeWandb, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert train(data, tmp_path / "run", "--steps", "1", "--log", "wandb").exit_code == 0
    assert "mode" not in wandb.runs[0]
    assert "project" not in wandb.runs[0]


def test_a_failing_logger_ends_itself_and_not_the_run(
    wandb: FakeWandb, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wandb.fails_from = 2
    result = train(data, tmp_path / "run", "--steps", "4", "--log", "jsonl,wandb")
    assert result.exit_code == 0, result.output
    assert caplog.text.count("no more logs for wandb: the network is gone") == 1
    assert [step for step, _ in wandb.logged] == [1]
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_logger_that_can_not_begin_is_one_line(wandb: FakeWandb, data: Path, tmp_path: Path) -> None:
    wandb.refuses = True
    result = train(data, tmp_path / "run", "--steps", "1", "--log", "wandb")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert "error: --log wandb: api_key not configured (no-tty). call wandb.login; WANDB_MODE=offline" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("tensorbord", "unknown logger 'tensorbord': did you mean tensorboard?"),
        ("", "log must name one or more of tensorboard, jsonl, wandb"),
        ("jsonl,jsonl", "each once"),
        ("jsonl,wandb", "--log wandb needs the package wandb; install it with: pip install 'dig-diffusion[wandb]'"),
    ],
)
def test_loggers_that_are_refused(
    log: str, message: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dig.packages.is_installed", lambda module: module != "wandb")
    result = train(data, tmp_path / "run", "--steps", "1", "--log", log)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_loggers_may_change_when_a_run_goes_on(wandb: FakeWandb, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "--steps", "2").exit_code == 0
    assert (run / "tensorboard").is_dir()
    assert json.loads((run / "config.json").read_text())["config"]["log"] == ["tensorboard", "jsonl"]
    words = ["train", "--resume", str(run), "--steps", "4", "--log", "wandb,jsonl"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [step for step, _ in wandb.logged] == [3, 4]
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4]

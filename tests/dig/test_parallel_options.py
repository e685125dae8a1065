"""Options under a launcher: a wrong one is said once, and what is of one process is done once."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dig.training.saving import checkpoint_files, read_checkpoint
from tests.dig.test_parallel_faults import Torchrun, train
from tests.dig.tiny import TINY, app, make_fashion, using

WRONG = {
    ("--parallel", "pipeline"): "error: --parallel must be auto, ddp or fsdp; got 'pipeline'",
    ("--hang-timeout", "0"): "error: --hang-timeout must be 1 to 2,592,000 seconds; got 0.0",
    ("--device", "tpu"): "error: unknown device 'tpu': choose auto, cuda or cpu",
    ("--batch", "many"): "error: Invalid value for '--batch': ",
    ("--resume", "nowhere"): "error: nowhere holds no run to go on with",
}


@pytest.mark.slow
@pytest.mark.parametrize("options", list(WRONG), ids=[" ".join(options) for options in WRONG])
def test_torchrun_with_a_wrong_option_says_so_once(options: tuple[str, str], tmp_path: Path) -> None:
    job = Torchrun(tmp_path, ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    try:
        log = job.end()
    finally:
        job.kill()
    (message,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert message.startswith(WRONG[options])
    # Of each rank that torchrun lists, the first to fail last; one that still imports when it is ended says nothing.
    *others, first = re.findall(r"exitcode\s*: (-?\d+)", log)
    assert first == "2", log
    assert set(others) <= {"2", f"-{signal.SIGTERM.value}"}, log
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with using(TINY):
        words = train(make_fashion(folder / "data", train=20, test=4), folder / "run", steps=1)
        assert CliRunner().invoke(app, words).exit_code == 0
    return folder / "run"


@pytest.mark.parametrize("kind", ["auto", "ddp"])
def test_one_process_that_is_to_send_by_copies_is_refused(kind: str, run: Path, tmp_path: Path) -> None:
    options = ["--parallel", kind, "--sending", "copies"]
    with using(TINY):
        result = CliRunner().invoke(app, train(run.parent / "data", tmp_path / "run", *options, steps=1))
    assert result.exit_code == 2
    told = "start them with torchrun, or give --sending auto"
    assert result.output == f"error: --sending copies is between several processes, and this one is alone: {told}\n"
    assert not (tmp_path / "run").exists()


def test_one_process_goes_on_with_a_run_of_several_that_copied(run: Path, tmp_path: Path) -> None:
    begun = shutil.copytree(run, tmp_path / "run")
    file = begun / "config.toml"
    options = file.read_text()
    assert options.count('sending = "collectives"') == 1
    file.write_text(options.replace('sending = "collectives"', 'sending = "copies"'))
    with using(TINY):
        result = CliRunner().invoke(app, ["train", "--resume", str(begun), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "nothing is sent, by copies or else: this process is alone" in result.output
    assert read_checkpoint(checkpoint_files(begun / "checkpoints")[0]).about["step"] == 2
    assert 'sending = "copies"' in file.read_text()  # For several, another time.


@pytest.mark.slow
def test_torchrun_consolidates_once(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    job = Torchrun(tmp_path, ["consolidate", str(run), "--out", str(out)])
    try:
        log = job.end()
    finally:
        job.kill()
    assert job.process.returncode == 0, log
    assert log.count(f" in one file: {out}") == 1
    assert read_checkpoint(out).about["step"] == 1


@pytest.mark.usefixtures("second")
def test_a_later_rank_does_not_consolidate(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["consolidate", str(run), "--out", str(tmp_path / "out.safetensors")]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output, list(tmp_path.iterdir())) == (0, "", [])
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize(
    "words",
    [
        ["export", "none.safetensors", "--out", "out", "--format", "diffusers"],
        ["evaluate", "--samples", "none.npz", "--data", "none", "--classifier", "none.safetensors"],
        ["classifier", "--data", "none", "--out", "out.safetensors"],
    ],
    ids=lambda words: words[0],
)
def test_what_one_process_does_a_later_rank_leaves_to_the_first(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, result.output) == (0, "")
    # The first looks at what it is given, and there is none of it.
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "none" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the second of two, as a launcher says."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    # A signal that comes too early or too late is not to end the tests.
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("options", list(WRONG), ids=[" ".join(options) for options in WRONG])
def test_an_error_of_a_later_rank_alone_is_said(
    options: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody ends it meanwhile: the first rank, which has met no error, goes on."""
    monkeypatch.setattr("dig.launched.QUIET_SECONDS", 0.1)
    levels = {name: logging.getLogger(name).level for name in ("dig", "dig.training.data")}
    result = CliRunner().invoke(app, ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert result.output.startswith(WRONG[options])
    # Whoever calls it in a process of his own logs afterwards as he did.
    assert {name: logging.getLogger(name).level for name in levels} == levels


@pytest.mark.usefixtures("second")
@pytest.mark.parametrize("options", list(WRONG), ids=[" ".join(options) for options in WRONG])
def test_a_later_rank_that_is_ended_is_silent(
    options: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun ends it once the first rank has said the same."""
    monkeypatch.setattr("dig.launched.QUIET_SECONDS", 60.0)
    done = threading.Event()

    def launch() -> None:
        while not done.wait(0.1):
            os.kill(os.getpid(), signal.SIGTERM)

    launcher = threading.Thread(target=launch)
    launcher.start()
    begun = time.monotonic()
    try:
        result = CliRunner().invoke(app, ["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *options])
    finally:
        done.set()
        launcher.join()
    assert (result.exit_code, result.output) == (2, "")
    assert time.monotonic() - begun < 50

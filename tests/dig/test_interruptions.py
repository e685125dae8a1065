"""Ctrl-C, SIGTERM and SIGHUP during a command other than train: what is kept is said, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dig.cli import app
from dig.commands.common import interruptible
from dig.packages import is_installed
from dig.sampling.runner import BatchSampler
from tests.dig.tiny import make_class_folders, make_vae

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()


def words_of(run: Path, *options: str) -> list[str]:
    words = ["sample", "--checkpoint", str(run), "--weights", "raw", "--device", "cpu", "--steps", "2"]
    return [*words, "--classes", "1,2", "--model-batch", "2", *options]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_real_process_says_what_it_keeps(number: signal.Signals, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "images [x]"
    command = [sys.executable, "-m", "tests.dig.tiny", *words_of(run, "--samples", "100000", "--images", str(out))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(out.glob("0*.png"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    kept = len(list(out.glob("0*.png")))
    assert told.splitlines()[-1] == f"stopped: {kept:,} of 100,000 images are in {out}; the same command goes on"
    assert "Traceback" not in told
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("0*.png")}
    again = runner.invoke(app, words_of(run, "--samples", str(kept + 2), "--images", str(out)))
    assert again.exit_code == 0, again.output
    assert f"({kept} made before)" in again.output
    assert all((out / name).stat().st_mtime_ns == at for name, at in before.items())


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    whole = BatchSampler.batch

    def batch(self: Any, number: int) -> Any:
        if number >= batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(self, number)

    monkeypatch.setattr(BatchSampler, "batch", batch)


def test_parts_of_an_npz_are_counted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.npz"
    words = words_of(run, "--samples", "8", "--batch", "2", "--npz", str(out))
    with monkeypatch.context() as patched:
        interrupt_after(patched, 2)
        stopped = runner.invoke(app, words)
    assert stopped.exit_code == 130
    assert f"stopped: 4 of 8 samples are in {out}.parts; the same command goes on" in stopped.stderr.replace("\n", " ")
    assert "8 samples (4 made before)" in runner.invoke(app, words).output


def test_a_grid_alone_keeps_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_after(monkeypatch, 0)
    stopped = runner.invoke(app, words_of(run, "--samples", "2", "--grid", str(tmp_path / "g.png")))
    assert stopped.exit_code == 130
    assert "stopped: nothing was saved yet; the same command begins again" in stopped.stderr
    assert not (tmp_path / "g.png").exists()


def test_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_installed("diffusers"):
        pytest.skip("the VAE is one of diffusers, an optional package: pip install diffusers (nox -s tests has it)")
    from dig.training.data import encoding

    images, vae = make_class_folders(tmp_path / "images", ("a", "b"), each=4), make_vae(tmp_path / "vae")
    words = ["encode", str(images), "--out", str(tmp_path / "out"), "--vae", str(vae), "--image-size", "16"]
    words += ["--device", "cpu", "--batch", "2", "--shard-size", "2"]
    whole, calls = encoding.sample_latents, []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(encoding, "sample_latents", counted)
    stopped = runner.invoke(app, words)
    assert stopped.exit_code == 130, stopped.output
    assert "stopped: 2 shards are in" in " ".join(stopped.stderr.split())
    assert "4 shards in" in runner.invoke(app, words).output


def test_handlers_come_back_and_what_was_ignored_stays_so() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible(lambda: ""):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in before} == before

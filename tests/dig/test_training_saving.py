"""Checkpoints under bad luck: damage, kills inside a save, full disks, names that others made."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dig.training import saving
from dig.training.saving import CheckpointError, checkpoint_files, checkpoint_path, save_checkpoint
from tests.dig.test_training import assert_same_run, command, damage_bytes, lines, train

pytestmark = pytest.mark.usefixtures("tiny_dig")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, out).exit_code == 0
    return out


def events(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_checkpoints_are_not_pushed_out_by_a_damaged_later_one(data: Path, tmp_path: Path) -> None:
    """The issue's case: steps 25 (good) and 50 (damaged), then --keep 1."""
    assert train(data, tmp_path, "--save-every", "25").exit_code == 0
    damage_bytes(checkpoint_path(tmp_path / "checkpoints", 50))
    result = train(data, tmp_path, "--keep", "1", "--save-every", "2", "--steps", "30")
    assert result.exit_code == 0, result.output
    assert [path.name for path in checkpoint_files(tmp_path / "checkpoints")] == ["step-00000030.safetensors"]
    # Out of the way, and not lost.
    assert "step-00000050.safetensors.damaged" in names(tmp_path / "checkpoints")
    result = train(data, tmp_path, "--keep", "1", "--save-every", "2", "--steps", "30")
    assert result.exit_code == 0
    assert "damaged" not in result.output


def test_later_checkpoints_neither_count_nor_go(tmp_path: Path) -> None:
    for step in (50, 25, 26, 27):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=2)
    assert [saving.step_of(path) for path in checkpoint_files(tmp_path)] == [50, 27, 26]


def test_steps_of_nine_digits_are_found_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 1_000_000_000):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)}, {}, keep=2)
    assert [saving.step_of(path) for path in checkpoint_files(tmp_path)] == [10**9, 10**8]


@pytest.mark.slow
def test_kills_inside_a_save_leave_no_heap(data: Path, whole: Path, tmp_path: Path) -> None:
    """Killed while safetensors writes, twice: each next attempt tidies up what the one before left."""
    script = (
        "import json, os, signal, sys\n"
        "from dig.training import saving\n"
        "from tests.dig.tiny import TINY, app, using\n"
        "write = saving.save_file\n"
        "def killed(tensors, path, header):\n"
        "    write(dict(tensors), path, header)\n"
        "    if json.loads(header['dig'])['step'] == 14:\n"
        "        os.truncate(path, 1000)\n"
        "        os.rename(path, os.path.join(os.path.dirname(path), '.tmpAbC123'))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "saving.save_file = killed\n"
        "with using(TINY):\n"
        "    app(sys.argv[1:], prog_name='dig')\n"
    )
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script, *command(data, tmp_path)], check=False)
        assert done.returncode == -9
        assert len([name for name in names(folder) if name.startswith(".")]) <= 1
    # Of earlier versions, which let safetensors write beside the checkpoints.
    (folder / ".tmpXYZ987").write_bytes(b"half")
    (folder / "step-00000021.json").write_text("{}")
    assert train(data, tmp_path).exit_code == 0
    assert not [name for name in names(folder) if name.startswith(".")]
    assert_same_run(tmp_path, whole)


def failing(monkeypatch: pytest.MonkeyPatch, step: int, folder: Path) -> None:
    """From this step on, the disk that holds the folder is full, as safetensors says it."""
    write = saving.save_file

    def full(tensors: Any, path: Path, header: dict[str, str]) -> None:
        if json.loads(header["dig"])["step"] >= step and folder in Path(path).parents:
            raise saving.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path, header)

    monkeypatch.setattr(saving, "save_file", full)


def test_a_full_disk_loses_nothing(data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, spare = tmp_path / "run", tmp_path / "spare"
    spare.mkdir()
    monkeypatch.setenv("TMPDIR", str(spare))
    monkeypatch.setattr("tempfile.tempdir", None)
    with monkeypatch.context() as broken:
        failing(broken, 21, run)
        result = train(data, run)
    assert result.exit_code == 2
    assert result.output.count("error:") == 1
    message = result.output[result.output.index("error:") :]
    assert "No space left on device" in message
    assert "what was trained, 21 steps, is kept in" in message
    assert events(run)[-1]["event"] == "failed"
    assert "No space left" in events(run)[-1]["reason"]
    assert saving.step_of(checkpoint_files(run / "checkpoints")[0]) == 14
    assert not [name for name in names(run / "checkpoints") if name.startswith(".")]
    (kept,) = spare.glob("dig-kept-*")
    for path in kept.iterdir():
        path.rename(run / "checkpoints" / path.name)
    result = train(data, run)
    assert result.exit_code == 0
    assert "going on from step 21" in result.output
    assert_same_run(run, whole)


def test_the_last_save_of_a_run_may_fail_too(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    failing(monkeypatch, 5, tmp_path / "run")
    result = train(data, tmp_path / "run", "--steps", "5")
    assert result.exit_code == 2
    assert "the last checkpoint holds them" not in result.output
    assert events(tmp_path / "run")[-1]["event"] == "failed"


@pytest.mark.slow
def test_a_limit_on_the_size_of_files_is_a_message(data: Path, tmp_path: Path) -> None:
    """A real failure to write, and no temporary folder that could take it either."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.dig.tiny", *command(data, tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit,
        env=environment,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error:") == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert events(tmp_path / "run")[-1]["event"] == "failed"


def test_a_line_of_the_log_that_fails_is_written_by_the_next(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dig.training.logs import RunLog

    write = RunLog.metrics

    def full(self: RunLog, step: int, values: dict[str, float | None]) -> None:
        if step == 24:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "train.jsonl")
        write(self, step, values)

    with monkeypatch.context() as broken:
        broken.setattr(RunLog, "metrics", full)
        result = train(data, tmp_path)
    assert result.exit_code == 2
    assert "train.jsonl: No space left on device; what was trained, 24 steps, is saved" in result.output
    assert lines(tmp_path)[-1]["step"] == 23
    assert train(data, tmp_path).exit_code == 0
    assert_same_run(tmp_path, whole)


def test_a_grid_that_fails_is_drawn_by_the_next(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "grid.png")

    options = ["--steps", "4", "--grid-every", "3", "--grid-steps", "1"]
    with monkeypatch.context() as broken:
        broken.setattr("dig.training.trainer.write_png", full)
        assert train(data, tmp_path, *options).exit_code == 2
    assert names(tmp_path / "samples") == []
    assert train(data, tmp_path, *options).exit_code == 0
    assert names(tmp_path / "samples") == ["step-00000003.png"]


def test_too_little_room_is_known_before(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dig.memory.shutil.disk_usage", lambda _: Namespace(free=2**20))
    result = train(data, tmp_path)
    assert result.exit_code == 2
    assert "the checkpoints need" in result.output
    assert "lower --keep" in result.output
    assert not checkpoint_files(tmp_path / "checkpoints")
    monkeypatch.undo()
    assert train(data, tmp_path, "--steps", "1", "--lr", "1e-3").exit_code == 0  # nothing blocks another run


@pytest.mark.parametrize("name", ["checkpoints", "samples", "train.jsonl", "events.jsonl", "config.json", ".lock"])
def test_what_is_in_the_way_is_known_before(name: str, data: Path, tmp_path: Path) -> None:
    """A file where a folder belongs, or the other way round."""
    if name in ("checkpoints", "samples"):
        (tmp_path / name).write_text("in the way")
    else:
        (tmp_path / name).mkdir()
    result = train(data, tmp_path, "--steps", "1")
    assert result.exit_code == 2, result.output
    assert result.output.count("error:") == 1
    assert name in result.output


def test_a_lock_does_not_follow_links(data: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("content")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(precious)
    assert train(data, tmp_path / "run", "--steps", "1").exit_code == 2
    assert precious.read_text() == "content"


def test_no_checkpoint_of_what_is_not_finite(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, keep=1)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(CheckpointError, match="a is not finite after step 2"):
            save_checkpoint(tmp_path, 2, {"a": torch.tensor([1, bad])}, {}, keep=1)
    assert [saving.step_of(path) for path in checkpoint_files(tmp_path)] == [1]
    big = {"a": torch.full((4,), 6e4, dtype=torch.float16), "n": torch.tensor(3)}  # its sum is infinite, itself is not
    save_checkpoint(tmp_path, 2, big, {}, keep=1)


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", "3", "{}", "", '{"sha256": 5}', " " * 2**21 + "{}"])
def test_hostile_records_are_damage(record: str, data: Path, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"a": torch.ones(2)}, {}, keep=1)
    checkpoint_path(tmp_path, 1).with_suffix(".json").write_text(record)
    assert "damaged" in str(saving.damage(checkpoint_path(tmp_path, 1)))

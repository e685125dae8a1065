"""Training by command: killed at any moment and gone on with, it repeats bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from dig.cli import app
from dig.spec import ModelSpec
from dig.training.config import DataSpec
from dig.training.logs import lines_until
from dig.training.saving import checkpoint_files, checkpoint_path, read_checkpoint, save_checkpoint
from dig.training.trainer import Trainer, TrainingError
from tests.dig.test_data_images import make_folder
from tests.dig.test_training_step import config

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()
OPTIONS = ["--model", "DiG-S/8", "--steps", "50", "--batch", "8", "--log-every", "1", "--save-every", "7"]
OPTIONS += ["--ema", "0.9", "--grid-every", "0", "--device", "cpu"]
MEASURED = ("images_per_second", "seconds", "memory_gib", "ceiling_share")


def command(data: Path, out: Path, *options: str) -> list[str]:
    return ["train", "--data", str(data), "--out", str(out), *OPTIONS, *options]


def train(data: Path, out: Path, *options: str) -> Any:
    return runner.invoke(app, command(data, out, *options))


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "train.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in found]


def newest(run: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_files(run / "checkpoints")[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run of 50 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = train(data, out)
    assert result.exit_code == 0, result.output
    return out


def assert_same_run(run: Path, whole: Path) -> None:
    """Every step once, every loss, every weight, moment and average."""
    assert [line["step"] for line in lines(run)] == list(range(1, 51))
    assert lines(run) == lines(whole)
    ours, theirs = newest(run), newest(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_choice_of_execution_is_said_and_kept(data: Path, tmp_path: Path) -> None:
    """By default what the device is good at; a run that has begun keeps its own."""
    first = train(data, tmp_path / "first", "--steps", "1")
    assert "execution eager: the default on a CPU, which has no CUDA graphs" in first.output.replace("\n", " ")
    content = json.loads((tmp_path / "first" / "config.json").read_text())["config"]
    assert (content["execution"], content["execution_reason"].split(",")[0]) == ("eager", "the default on a CPU")
    path = tmp_path / "first" / "config.json"
    path.write_text(path.read_text().replace('"execution": "eager"', '"execution": "compile"'))
    # The checkpoint says it of itself too, and the two are compared.
    saved = read_checkpoint(checkpoint_files(tmp_path / "first" / "checkpoints")[0])
    saved.about["config"]["execution"] = "compile"
    save_checkpoint(saved.path.parent, 1, saved.tensors, saved.about, keep=1)
    again = train(data, tmp_path / "first", "--steps", "1")
    assert again.exit_code == 0, again.output
    assert "execution compile: " in again.output
    other = train(data, tmp_path / "first", "--steps", "1", "--execution", "eager")
    assert "execution: eager, compile" in other.output.replace("\n", " ")


def test_loss_falls_and_everything_is_saved(whole: Path) -> None:
    losses = [line["loss"] for line in lines(whole)]
    assert losses[0] == pytest.approx(1, abs=0.15)  # the output starts at zero, so the loss at the noise's variance
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.01
    assert [path.name for path in checkpoint_files(whole / "checkpoints")] == [
        f"step-{step:08d}.safetensors" for step in (50, 49, 42)
    ]
    tensors = newest(whole)
    names = {name.partition(".")[0] for name in tensors}
    assert names == {"model", "ema", "optimizer", "random", "sums"}
    weight = "blocks.0.mlp.down_proj.weight"
    assert not torch.equal(tensors[f"model.{weight}"], tensors[f"ema.{weight}"])
    assert any((whole / "tensorboard").iterdir())
    readable = (whole / "config.json").stat().st_mode
    assert checkpoint_files(whole / "checkpoints")[0].stat().st_mode == readable


@pytest.mark.slow
def test_killed_and_gone_on_with(whole: Path, data: Path, tmp_path: Path) -> None:
    """Real processes, killed by SIGKILL at moments that nobody chose, until the run is done."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "run" / "train.jsonl"
    kills = 0
    for target in (3, 16, 31, None):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.dig.tiny", *command(data, tmp_path / "run")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        if target is None:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
            break
        deadline = time.monotonic() + 60
        while not lines_reach(log, target) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 3
    assert_same_run(tmp_path / "run", whole)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    # Killed before its first checkpoint, the run starts anew.
    assert [(event["event"], event["step"]) for event in events[:2]] == [("started", 0), ("started", 0)]
    assert [event["event"] for event in events[2:]] == ["resumed", "resumed", "finished"]
    assert events[-1]["step"] == 50


def lines_reach(log: Path, step: int) -> bool:
    lines = lines_until(log, 10**6)  # Read once: a run that starts anew empties the log meanwhile.
    return bool(lines) and json.loads(lines[-1])["step"] >= step


@pytest.mark.slow
def test_terminated_it_saves_and_goes_on_within_a_line_of_the_log(data: Path, tmp_path: Path) -> None:
    """SIGTERM between two lines and two checkpoints: the line's mean is over the steps of both processes."""
    options = ["--log-every", "50", "--save-every", "1000"]
    assert train(data, tmp_path / "whole", *options).exit_code == 0
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.dig.tiny", *command(data, run, *options)], stderr=subprocess.PIPE, text=True
    )
    while not (run / "events.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "go on with the same command" in errors
    assert len(checkpoint_files(run / "checkpoints")) == 1
    assert train(data, run, *options).exit_code == 0
    (line,) = lines(run)
    assert line == lines(tmp_path / "whole")[0]
    assert line["step"] == 50


def damage_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.slow
def test_damaged_newest_checkpoint(whole: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(data, run, "--steps", "28").exit_code == 0
    damage_bytes(checkpoint_path(run / "checkpoints", 28))
    # A process of its own: its warnings go to its stderr.
    errors = run_in_process(data, run)
    assert "step-00000028.safetensors is damaged" in errors.replace("\n", "")
    assert "the checkpoint before it is used" in errors
    assert "going on from step 21" in errors
    assert_same_run(run, whole)


def run_in_process(data: Path, out: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.dig.tiny", *command(data, out, *options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "400"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("what", ["record", "cut off", "all"])
def test_damage_of_other_kinds(what: str, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--steps", "14").exit_code == 0
    path = checkpoint_path(tmp_path / "checkpoints", 14)
    if what == "record":
        path.with_suffix(".json").write_text('{"sha')
    else:
        path.write_bytes(path.read_bytes()[:1000])
    if what == "all":
        damage_bytes(checkpoint_path(tmp_path / "checkpoints", 7))
    result = train(data, tmp_path, "--steps", "15")
    if what == "all":
        assert result.exit_code == 2
        assert "every checkpoint" in result.output
        assert "is damaged" in result.output
    else:
        assert result.exit_code == 0
        assert "going on from step 7" in result.output


def test_leftovers_of_a_kill_inside_a_save_are_no_checkpoint(whole: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--steps", "14").exit_code == 0
    folder = tmp_path / "checkpoints"
    # After the file, before its record; and inside the file.
    checkpoint_path(folder, 14).with_suffix(".json").unlink()
    (folder / ".step-00000021.safetensors.tmp").write_bytes(b"half")
    result = train(data, tmp_path)
    assert result.exit_code == 0, result.output
    assert "going on from step 7" in result.output
    assert_same_run(tmp_path, whole)
    assert not list(folder.glob(".*"))


def test_steps_may_be_raised_and_another_run_is_refused(whole: Path, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--steps", "21").exit_code == 0
    for options, name in (
        (["--batch", "4"], "batch: 4, 8"),
        (["--lr", "3e-4"], "--lr: 0.0003, 0.0001"),
        (["--seed", "1"], "seed: 1, 0"),
        (["--model", "DiG-S/8:variant=release"], "variant: release, paper"),
    ):
        result = train(data, tmp_path, *options)
        assert result.exit_code == 2
        assert "holds another run" in result.output
        assert name in result.output
    assert train(data, tmp_path, "--save-every", "5").exit_code == 0
    assert lines(tmp_path) == lines(whole)


def test_a_longer_cosine_is_another_run(data: Path, tmp_path: Path) -> None:
    options = ["--schedule", "cosine", "--warmup", "2"]
    assert train(data, tmp_path, "--steps", "4", *options).exit_code == 0
    rates = [line["learning_rate"] for line in lines(tmp_path)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 0.5e-4])
    result = train(data, tmp_path, "--steps", "5", *options)
    assert result.exit_code == 2
    assert "steps: 5, 4" in result.output


def test_log_is_cut_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "train.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 2}\n{"step": 3}\n{"st')
    assert lines_until(log, 2) == ['{"step": 1}', '{"step": 2}']
    assert lines_until(tmp_path / "none", 2) == []


def test_a_loss_that_is_not_finite_ends_the_run_unsaved(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path, "--lr", "1e30", "--log-every", "1000")
    assert result.exit_code == 2
    assert "not finite at step 2" in result.output
    assert not checkpoint_files(tmp_path / "checkpoints")


def test_grids_come_from_fixed_noise(data: Path, tmp_path: Path) -> None:
    options = ["--steps", "3", "--grid-every", "1", "--grid-steps", "2", "--lr", "1e-20", "--ema", "0"]
    assert train(data, tmp_path, *options).exit_code == 0
    grids = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "samples").iterdir())]
    assert len(grids) == 3
    assert grids[0].shape == (4 * 34 - 2, 10 * 34 - 2, 3)
    assert np.array_equal(grids[0], grids[2])  # a learning rate that moves nothing
    assert grids[0][:32, :32].std() > 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "DiG-S/3"], "unknown patch size 3"),
        (["--model", "Dig-S/2"], "did you mean DiG"),
        (["--model", "DiG-S/2:recurence=fla"], "did you mean backend?"),
        (["--model", "DiG-S/2:triton"], "needs an NVIDIA GPU; DiG runs on a CPU with reference only"),
        (["--image-size", "30"], "--image-size must be positive multiples of the patch size 8"),
        (["--image-size", "20"], "larger than --image-size 20"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--batch", "10", "--accumulate", "3"], "does not divide into 3 equal parts"),
        (["--loss", "mse"], "--loss must be one of hybrid, flow-matching"),
        (["--schedule", "linear"], "schedule must be one of constant, cosine"),
        (["--ema", "1"], "--ema must be at least 0 and below 1"),
        (["--lr", "0"], "--lr must be a finite number above 0"),
        (["--lr", "inf"], "--lr must be a finite number above 0; got inf"),
        (["--weight-decay", "inf"], "--weight-decay must be a finite number, 0 or more; got inf"),
        (["--log-every", "0"], "error: --log-every must be at least 1"),
        (["--grid-cfg", "nan"], "error: --grid-cfg must be a finite number"),
        (["--clip", "-1"], "clip must be a finite number, 0 or more"),
        (["--dtype", "fp16"], "--dtype must be bf16 or fp32"),
        (["--execution", "graph"], "needs an NVIDIA GPU; use eager or compile"),
        (["--execution", "jit"], "execution must be one of auto, eager, compile, graph"),
        (["--device", "cuda"], "no NVIDIA GPU was found"),
        (["--device", "tpu"], "choose auto, cuda or cpu"),
        (["--vae", "sd-vae"], "it needs no --vae"),
        (["--data", "{folder}/none"], "/none does not exist"),
        (["--out", "/dev/null/run"], "/dev/null"),
    ],
)
def test_bad_input(options: list[str], message: str, data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path / "run", *(word.format(folder=tmp_path) for word in options))
    assert result.exit_code == 2, result.output
    assert message in result.output.replace("\n", " ")
    assert result.output.count("error:") == 1
    assert "Traceback" not in result.output
    assert not (tmp_path / "run" / "train.jsonl").exists()


def test_training_does_without_tensorboard(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dig.training.loggers.is_installed", lambda module: False)
    assert train(data, tmp_path, "--steps", "2", "--grid-every", "2", "--grid-steps", "1").exit_code == 0
    assert "pip install 'dig-diffusion[train]'" in caplog.text
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert not (tmp_path / "tensorboard").exists()


def test_flow_matching_trains(data: Path, tmp_path: Path) -> None:
    result = train(data, tmp_path, "--loss", "flow-matching", "--steps", "20", "--grid-every", "20", "--lr", "1e-3")
    assert result.exit_code == 0, result.output
    losses = [line["loss"] for line in lines(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    assert "vb" not in lines(tmp_path)[0]
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_trainer_is_a_library_too(data: Path, tmp_path: Path) -> None:
    """A run of a data set of one's own, no command involved; and what it refuses."""
    from dig.training.data import open_dataset

    dataset = open_dataset(data, image_size=32)
    spec = ModelSpec(name="DiG-S/8", input_size=(32, 32), in_channels=1, num_classes=10)
    run = config(model=spec, data=DataSpec.of(dataset), steps=2)
    trainer = Trainer(run, dataset, tmp_path / "run")
    assert trainer.run() == 2
    held = Trainer(run, dataset, tmp_path / "run")
    with pytest.raises(ValueError, match="another process is training into"):
        Trainer(run, dataset, tmp_path / "run")
    assert held.run() == 2
    with pytest.raises(ValueError, match="the model takes"):
        config(data=DataSpec.of(dataset))
    assert issubclass(TrainingError, RuntimeError)


@pytest.mark.parametrize("inside", [".", "run", "cat/run"])
def test_a_run_inside_of_its_data_is_refused_before_it_is_made(inside: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "data", {"cat": 2, "dog": 2}, side=20)
    result = train(folder, folder / inside, "--image-size", "16", *OPTIONS)
    assert result.exit_code == 2
    assert "lies in the data's own folder" in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["cat", "dog"]


def test_a_run_that_is_done_says_so(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "run", "--steps", "2").exit_code == 0
    for steps in ("2", "1"):
        again = train(data, tmp_path / "run", "--steps", steps)
        assert again.exit_code == 0, again.output
        said = again.output.replace("\n", " ")
        assert f"{tmp_path / 'run'} is finished already, at step 2; to train on, give a larger --steps" in said
        assert "going on" not in said

"""Progress: a line every half minute where there is no terminal, a bar where there is one, nothing if asked."""

from __future__ import annotations

import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench.cli import main as bench_cli
from dig import progress
from dig.cli import app
from dig.memory import in_bytes
from dig.progress import Follower, duration, following
from dig.spec import ModelSpec
from tests.dig.test_training_identity import class_folders, make_vae
from tests.dig.tiny import TINY

pytestmark = pytest.mark.usefixtures("tiny_dig")

runner = CliRunner()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def follower(clock: Clock, lines: list[str], **options: Any) -> Follower:
    arguments: dict[str, Any] = {"show": None, "say": lines.append, "what": "training", "total": 1000, "clock": clock}
    return Follower(**{**arguments, **options})


def test_a_line_after_the_first_steps_then_by_time() -> None:
    clock, lines = Clock(), []
    told = follower(clock, lines, images=8, memory=lambda: 3 * 2**30)
    for step in range(1, 201):
        clock.now += 60 if step == 1 else 0.5  # the first one compiles
        told.update(step, figures="loss 0.5000")
    # The first line counts neither the compilation nor steps that it didn't see.
    assert lines[0] == "training: step 1 of 1,000, loss 0.5000, 3 GiB"
    assert lines[1] == "training: step 61 of 1,000, loss 0.5000, 16 images/s, 8 min left, 3 GiB"
    assert [line.split(" of ")[0] for line in lines] == [f"training: step {step}" for step in (1, 61, 121, 181)]


def test_quick_steps_wait_for_a_rate() -> None:
    clock, lines = Clock(), []
    told = follower(clock, lines)
    for step in range(1, 50):
        clock.now += 0.1
        told.update(step)
    assert lines == ["training: step 5 of 1,000, 10 images/s, 99 s left"]


def test_the_rate_is_of_the_last_half_minute() -> None:
    clock, lines = Clock(), []
    told = follower(clock, lines, total=None)
    for step in range(1, 201):
        clock.now += 0.1 if step <= 100 else 1.0
        told.update(step)
    assert lines[-1].startswith("training: step 181")
    assert "1 images/s" in lines[-1]
    assert "left" not in lines[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5999, "1 h 40 min"), (18_720, "5 h 12 min"), (3e5, "3 d 11 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_and_no_loss_before_there_is_one() -> None:
    file = Terminal()
    console = Console(file=file, force_terminal=True, width=200)
    with following(console, "training", total=10) as told:
        told.update(1)
        told.update(2, figures="loss 0.1250")
    text = file.getvalue()
    assert "nan" not in text
    assert "loss 0.1250" in text
    assert "step 1 of 10" not in text


def test_colours_that_are_forced_make_a_file_no_terminal() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=200)
    with following(console, "training", total=5) as told:
        for step in range(1, 6):
            told.update(step)
    assert file.getvalue().startswith("training: step 5 of 5")
    assert file.getvalue().count("\n") == 1


OPTIONS = ["--model", "DiG-S/8", "--steps", "6", "--batch", "8", "--grid-every", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    result = runner.invoke(app, ["train", "--data", str(data), "--out", str(out), *OPTIONS])
    assert result.exit_code == 0, result.output
    # A loss from the first steps on, though the log has its first line after 50.
    (line,) = [line for line in result.stderr.splitlines() if line.startswith(f"training into {out}: step")]
    assert line.startswith(f"training into {out}: step 5 of 6, loss ")
    assert "images/s" in line
    assert "nan" not in line
    assert line.endswith("iB")
    return out


def test_every_command_says_how_far_it_is(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_UPDATES", 1)
    npz = tmp_path / "a.npz"
    words = ["--npz", str(npz), "--steps", "2", "--samples", "20", "--batch", "20", "--model-batch", "10"]
    result = runner.invoke(app, ["sample", "--checkpoint", str(run), *words])
    assert f"sampling into {npz}: sample 10 of 20" in result.stderr  # within a part of the file
    classifier = ["classifier", "--data", str(data), "--out", str(tmp_path / "c.safetensors"), "--epochs", "0.5"]
    result = runner.invoke(app, [*classifier, "--device", "cpu", "--workers", "0"])
    assert f"training {tmp_path / 'c.safetensors'}: step 1 of" in result.stderr
    words = ["--samples", str(npz), "--data", str(data), "--classifier", str(tmp_path / "c.safetensors")]
    result = runner.invoke(app, ["evaluate", *words])
    assert result.exit_code == 0, result.output
    assert "image 40 of 40" in result.stderr
    assert f"reading {npz}: image 20 of 20" in result.stderr
    assert "Fréchet distance" in result.stdout
    dry = runner.invoke(app, ["evaluate", *words, "--dry-run", "--quiet"])
    assert "data: " in dry.stdout
    assert "20 images are compared" in dry.stdout
    assert "Fréchet distance:" not in dry.stdout.split("features")[0]
    quiet = runner.invoke(app, ["evaluate", *words, "--quiet"])
    assert quiet.stderr == ""
    assert quiet.stdout == result.stdout


def test_folders_of_samples_say_how_far_they_are(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "FIRST_UPDATES", 1)
    folder, classifier = tmp_path / "pngs", tmp_path / "c.safetensors"
    sample = ["sample", "--checkpoint", str(run), "--steps", "2", "--model-batch", "4", "--device", "cpu"]
    loud = runner.invoke(app, [*sample, "--images", str(folder), "--samples", "8"])
    assert loud.exit_code == 0, loud.output
    assert f"sampling into {folder}: sample 4 of 8, " in loud.stderr
    # More of them, quietly: of what was made before nothing is made again.
    quiet = runner.invoke(app, [*sample, "--images", str(folder), "--samples", "12", "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert quiet.stdout.startswith(f"12 samples (8 made before) in {folder}: ")
    words = ["classifier", "--data", str(data), "--out", str(classifier), "--epochs", "0.5", "--device", "cpu"]
    assert runner.invoke(app, [*words, "--workers", "0"]).exit_code == 0
    words = ["evaluate", "--checkpoint", str(run), "--samples", "6", "--steps", "2", "--data", str(data)]
    words += ["--classifier", str(classifier), "--device", "cpu"]
    loud = runner.invoke(app, [*words, "--images", str(tmp_path / "a")])
    assert loud.exit_code == 0, loud.output
    assert f"sampling into {tmp_path / 'a'}: sample 6 of 6" in loud.stderr
    assert f"reading {tmp_path / 'a'}: image 6 of 6" in loud.stderr
    quiet = runner.invoke(app, [*words, "--images", str(tmp_path / "b"), "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "")
    assert quiet.stdout.splitlines()[-1] == loud.stdout.splitlines()[-1]


def test_warnings_are_lines_like_those_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(stderr=True, soft_wrap=True, markup=False, width=40)
    record = logging.LogRecord("dig", logging.WARNING, "", 0, "%s can't be read,\nfor it is [red]", ("a" * 60,), None)
    progress._Teller(console).emit(record)
    assert capsys.readouterr().err == f"warning: {'a' * 60} can't be read, for it is [red]\n"


def test_what_has_no_images_has_no_rate() -> None:
    clock, lines = Clock(), []
    told = follower(clock, lines, unit="case", images=0)
    for case in range(1, 8):
        clock.now += 10
        told.update(case)
    assert [line.split(",")[0] for line in lines] == [f"training: case {case} of 1" for case in (1, 4, 7)]
    assert lines[-1] == "training: case 7 of 1,000, 2 h 46 min left"


def test_encoding_counts_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(progress, "FIRST_UPDATES", 2)
    pictures, vae = class_folders(tmp_path / "pictures"), make_vae(tmp_path / "vae", 0)
    words = ["encode", str(pictures), "--vae", str(vae), "--image-size", "16", "--batch", "2", "--shard-size", "4"]
    words += ["--device", "cpu", "--workers", "1", "--out", str(tmp_path / "latents")]
    dry = runner.invoke(app, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "24 in fp16, as they are and mirrored, in 3 shards" in dry.stdout
    assert not (tmp_path / "latents").exists()
    result = runner.invoke(app, words)
    assert f"encoding into {tmp_path / 'latents'}: image 4 of 12" in result.stderr
    quiet = runner.invoke(app, [*words, "--quiet"])
    assert (quiet.exit_code, quiet.stderr) == (0, "")


def test_quiet_keeps_warnings_and_errors(run: Path, data: Path, tmp_path: Path) -> None:
    words = ["train", "--data", str(data), "--out", str(tmp_path / "run"), *OPTIONS, "--quiet"]
    result = runner.invoke(app, words)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"6 steps in {tmp_path / 'run'}")
    wrong = runner.invoke(app, [*words, "--lr", "2e-4"])
    assert wrong.exit_code == 2
    assert wrong.stderr.startswith("error: ")
    grid = ["--grid", str(tmp_path / "g.png"), "--samples", "1", "--steps", "1", "--cfg", "2", "--quiet"]
    sampled = runner.invoke(app, ["sample", "--checkpoint", str(run), *grid])
    assert sampled.stderr.startswith("warning: guidance may mean little")


def test_a_dry_run_measures_and_writes_nothing(run: Path, data: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in data.iterdir())
    out = tmp_path / "run"
    result = runner.invoke(app, ["train", "--data", str(data), "--out", str(out), *OPTIONS, "--dry-run"])
    assert result.exit_code == 0, result.output
    facts = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert facts["parameters"] == f"{sum(p.numel() for p in TINY_MODEL.parameters()):,}"
    assert facts["steps"] == "6"
    assert "300 samples of 1x32x32" in facts["data"]
    assert "weights " in facts["memory estimated"]
    assert "for 6 steps" in facts["time"]
    assert not out.exists()
    assert sorted(path.name for path in data.iterdir()) == before
    done = runner.invoke(app, ["train", "--data", str(data), "--out", str(run), *OPTIONS, "--dry-run"])
    assert "steps: 6, 6 of them done" in done.stdout
    assert "time: none" in done.stdout
    sampled = runner.invoke(app, ["sample", "--checkpoint", str(run), "--dry-run", "--samples", "40", "--first", "8"])
    assert sampled.exit_code == 0, sampled.output
    assert "16 at once, 3 batches" in sampled.stdout
    assert "ddim, 50 steps" in sampled.stdout
    wrong = runner.invoke(app, ["train", "--data", str(data), "--out", str(out), "--lr", "0", "--dry-run"])
    assert wrong.exit_code == 2


TINY_MODEL = TINY.build("S", input_size=(32, 32), in_channels=1, num_classes=10, patch_size=8)


def test_versions() -> None:
    for command_line in (app, bench_cli.app):
        result = runner.invoke(command_line, ["--version"])
        assert result.exit_code == 0
        assert result.stdout.startswith("dig-diffusion ")
        assert "torch 2." in result.stdout


def test_a_dry_run_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_cli, "gpu_present", lambda: False)
    monkeypatch.setattr(bench_cli, "run_sweep", lambda *args, **kwargs: pytest.fail("measured in a dry run"))
    out = tmp_path / "rows.jsonl"
    words = ["run", "--models", "DiT", "--resolution", "64", "--launches", "2", "--out", str(out), "--dry-run"]
    result = runner.invoke(bench_cli.app, words)
    assert result.exit_code == 0, result.output
    assert "DiT-S/2 (backend=materialized) 64px train eager fp32 batch 1 on cpu: 32,865,056 parameters" in result.stdout
    assert "4 cases to measure" in result.stdout
    assert "at most 80 min" in result.stdout
    assert not out.exists()


def test_a_dry_run_of_the_benchmark_knows_earlier_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.store.ledgers import Memory
    from bench.store.rows import ResultsWriter
    from tests.bench.test_rows import make_row

    monkeypatch.setattr(bench_cli, "gpu_present", lambda: False)
    case = replace(make_row().case, model="DiT-S/2", options=(("backend", "materialized"),), resolution=64, batch=1)
    case = replace(case, mode="forward", execution="eager", dtype="fp32", device="cpu", scope="", weights="fp32")
    out = tmp_path / "rows.jsonl"
    with ResultsWriter(out) as writer:
        memory = Memory(parameters=10, allocator_peak=3 * 2**30)
        writer.write(make_row(case=case, seconds={"start": 40.0, "measure": 2}, memory=memory))
    words = ["run", "--models", "DiT", "--resolution", "64", "--out", str(out), "--dry-run"]
    result = runner.invoke(bench_cli.app, words)
    assert result.exit_code == 0, result.output
    said = dict(line.split(": ", 1) for line in result.stdout.splitlines() if ": " in line)
    assert said[case.describe()].endswith("; before: 2 ms a step, 42 s in all, 3 GiB at most")
    # The same case with a gradient is another one; what it needs is estimated, what it took isn't known.
    assert " before" not in said[case.describe().replace("forward", "train")]
    assert "; 1 of them took 42 s before; at most" in result.stdout
    words[words.index("64")] = "128"
    other = runner.invoke(bench_cli.app, words)
    line = next(line for line in other.stdout.splitlines() if "128px forward" in line)
    assert line.endswith("; 64px batch 1 before: 2 ms a step, 42 s in all, 3 GiB at most")
    assert "; 1 of them an estimated 42 s, as the nearest size did; at most" in other.stdout


def test_a_dry_run_of_the_benchmark_estimates_memory() -> None:
    from bench.cases.case import Case
    from bench.cli.dry_run import size_of

    case = Case(model="DiT-S/2", resolution=64, batch=3, dtype="fp32", device="cpu")
    spec = ModelSpec(name="DiT-S/2", input_size=(8, 8), in_channels=4, num_classes=1000)
    model = spec.build()
    parameters, constants = sum(p.numel() for p in model.parameters() if p.requires_grad), 16 * 384
    inputs = 12 * 3 * 16 * 384  # of 12 blocks: 3 images of 16 tokens of 384 channels
    parts = {"weights": parameters + constants, "gradients": parameters, "optimizer": 2 * parameters}
    said = ", ".join(f"{name} {in_bytes(4 * size)}" for name, size in {**parts, "activations": inputs}.items())
    total = in_bytes(4 * (sum(parts.values()) + inputs))
    assert size_of(case) == f"{parameters:,} parameters, an estimated {total} at least ({said})"
    forward = size_of(replace(case, mode="forward", dtype="bf16", weights="bf16"))
    assert f"(weights {in_bytes(2 * (parameters + constants))}, activations " in forward


def test_a_quiet_benchmark_still_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.test_rows import make_row

    monkeypatch.setattr(bench_cli, "gpu_present", lambda: False)
    rows = [make_row(), make_row(status="error", message="it broke", samples_ms=())]
    monkeypatch.setattr(bench_cli, "run_sweep", lambda *args, **kwargs: iter(rows))
    words = ["run", "--models", "DiT", "--resolution", "64", "--out", str(tmp_path / "rows.jsonl")]
    assert "\n\n" not in runner.invoke(bench_cli.app, words).stderr
    result = runner.invoke(bench_cli.app, [*words, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "it broke" in result.stderr
    assert "img/s" not in result.stderr
    assert "done: 2 rows" in result.stderr


def test_samples_of_a_dry_run_are_none(run: Path, tmp_path: Path) -> None:
    npz = tmp_path / "there" / "a.npz"
    result = runner.invoke(app, ["sample", "--checkpoint", str(run), "--npz", str(npz), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert not npz.parent.exists()
    assert np.isfinite(float(result.stdout.split("time: ")[1].split(" s a step")[0]))

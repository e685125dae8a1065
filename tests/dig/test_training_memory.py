"""What training is said to take, against what it takes; and what is said where it is too much."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dig.cli import app
from dig.spec import ModelSpec
from dig.training import needs as needed
from dig.training.activations import _count, count_saved
from dig.training.config import BATCH, DataSpec, TrainConfig
from dig.training.needs import check_training, draws_in_training, training_needs
from tests.dig.tiny import TINY, TINY_DIT, make_fashion, using

runner = CliRunner()
FACTOR = 2
"""How far above a process' pages the estimate may lie: how many of them the libraries and the C library's heap take
differs by 20% between machines and runs. What the process' tensors take doesn't."""
CLOSE = 0.05
"""Of the count: where equal blocks are counted once, a tensor that two of them hold may count twice."""

CASES: list[tuple[str, int, dict[str, object]]] = [
    ("DiG-S/4", 32, {}),
    ("DiG-S/4", 64, {"accumulate": 4}),
    ("DiT-S/4", 48, {}),
    ("DiT-S/4", 48, {"checkpoint_blocks": True}),
]
MEASURE = """
import dataclasses, json, os, sys
import psutil, torch
import bench.models
from torch.profiler import ProfilerActivity, profile
from dig.memory import peak_memory
from dig.training.inputs import StepInputs
from dig.training.needs import training_needs
from dig.training.step import build_step
from tests.dig.test_training_memory import CASES, config_of
from tests.dig.tiny import TINY, TINY_DIT, using

def two_steps(config):
    step = build_step(config)
    parts = (config.accumulate, config.batch // config.accumulate)
    x = torch.randn(*parts, *config.model.sample_shape)
    t, y = torch.randint(1000, parts), torch.zeros(parts, dtype=torch.int64)
    for _ in range(2):
        step.run(StepInputs(x=x, y=y, t=t, noise=torch.randn_like(x)), 1e-4)

def pages(config):
    before = psutil.Process().memory_info().rss
    two_steps(config)
    return peak_memory("cpu") - before

def tensors(config):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        two_steps(config)
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak

with using(TINY), using(TINY_DIT):
    for name, batch, others in CASES:
        if (child := os.fork()) == 0:
            config = dataclasses.replace(config_of(name, batch=batch), **others)
            said = training_needs(config)
            print(json.dumps([said, {"pages": pages, "tensors": tensors}[sys.argv[1]](config)]), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
"""


def measure(what: str) -> list[tuple[dict[str, int], int]]:
    """What is said and what is taken by each of the cases.

    Each is in a process of its own: memory that others left behind would hide the peak.
    """
    done = subprocess.run([sys.executable, "-c", MEASURE, what], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(found) == len(CASES)
    return [(said, took) for said, took in found]


def config_of(name: str, *, batch: int, side: int = 64) -> TrainConfig:
    spec = ModelSpec(name=name, input_size=(side, side), in_channels=3, num_classes=2)
    data = DataSpec(samples=8, shape=(3, side, side), class_names=("a", "b"), mirror=False)
    return TrainConfig(model=spec, data=data, device="cpu", steps=2, batch=batch, dtype="fp32")


def test_the_estimate_against_what_tensors_take() -> None:
    """From weights to activations closely; of the blocks added for the backward pass' own results, one is enough."""
    for case, (said, peak) in zip(CASES, measure("tensors"), strict=True):
        block = (said.pop("working memory") - needed.PYTORCH) / needed.WORKING_BLOCKS
        kept = sum(said.values())
        assert kept * (1 - CLOSE) < peak < kept + block, (case, said, peak / 2**20)


def test_the_estimate_against_what_the_process_takes() -> None:
    """A process whose run was taken isn't killed, and the estimate isn't far above what it takes."""
    for case, (said, took) in zip(CASES, measure("pages"), strict=True):
        total = sum(said.values())
        assert took < total < took * FACTOR, (case, total / 2**20, took / 2**20)


@pytest.mark.parametrize("name", ["DiG-S/2", "DiT-S/2"])
def test_small_inputs_say_what_a_larger_one_saves(name: str) -> None:
    spec = ModelSpec(name=name, input_size=(40, 24), in_channels=3, num_classes=2)
    with using(TINY), using(TINY_DIT):
        saved = count_saved(spec, bf16=False)
        with torch.device("meta"):
            model = spec.build().train()
        assert saved is not None
        assert saved.blocks == 2
        assert saved.each == pytest.approx(_count(model, 1, bf16=False), rel=CLOSE)
        assert 5 * saved.each == pytest.approx(_count(model, 5, bf16=False), rel=CLOSE)


def test_weights_cast_by_autocast_are_saved_once() -> None:
    spec = ModelSpec(name="DiT-S/2", input_size=(32, 32), in_channels=3, num_classes=2)
    with using(TINY_DIT):
        saved = count_saved(spec, bf16=True)
        with torch.device("meta"):
            model = spec.build().train()
        assert saved is not None
        assert saved.once > 2 * 64 * 64
        assert saved.once + 3 * saved.each == pytest.approx(_count(model, 3, bf16=True), rel=CLOSE)


def test_what_would_fit_is_said_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    with using(TINY_DIT):
        config = config_of("DiT-S/4", batch=64)
        room = sum(training_needs(dataclasses.replace(config, batch=20)).values())
        monkeypatch.setattr(needed, "available_memory", lambda _: room)
        monkeypatch.setattr("dig.memory.available_memory", lambda _: room)
        with pytest.raises(ValueError, match=r"^about .* are needed \(.*activations .*--batch 20 would fit") as refused:
            check_training(config)
        check_training(dataclasses.replace(config, batch=20))
        parts = re.search(r"this --batch with --accumulate (\d+)", str(refused.value))
        assert parts is not None
        check_training(dataclasses.replace(config, accumulate=int(parts[1])))
        with pytest.raises(ValueError, match="about"):
            check_training(dataclasses.replace(config, accumulate=int(parts[1]) // 2))
        monkeypatch.setattr(needed, "available_memory", lambda _: 2**20)
        with pytest.raises(ValueError, match="not even --batch 1 fits; try a smaller model"):
            check_training(config)


def test_the_published_size_by_default_is_within_a_small_machine() -> None:
    """DiG-S/2 at 64 pixels: refused with DiT's 256 images a step, taken with the default."""
    config = config_of("DiG-S/2", batch=BATCH["cpu"])
    assert sum(training_needs(config).values()) < 12 * 2**30
    assert sum(training_needs(dataclasses.replace(config, batch=BATCH["cuda"])).values()) > 200 * 2**30


@pytest.mark.usefixtures("tiny_dig")
def test_a_dry_run_says_the_same_and_a_run_keeps_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = make_fashion(tmp_path / "data", train=20), tmp_path / "run"
    words = ["train", "--model", "DiG-S/8", "--data", str(data), "--out", str(out), "--device", "cpu", "--steps", "1"]
    words += ["--grid-every", "0"]
    told = runner.invoke(app, [*words, "--dry-run"])
    assert told.exit_code == 0, told.output
    line = next(line for line in told.stdout.splitlines() if line.startswith("memory estimated: "))
    assert "activations " in line
    assert "working memory " in line
    assert f"batch: {BATCH['cpu']}\n" in told.stdout
    assert runner.invoke(app, words).exit_code == 0
    assert f"\nbatch = {BATCH['cpu']}\n" in (out / "config.toml").read_text()
    # Another version's default, or another device's, doesn't change a run that has begun.
    monkeypatch.setitem(BATCH, "cpu", 5)
    again = runner.invoke(app, [*words, "--steps", "2"])
    assert again.exit_code == 0, again.output


def test_a_model_that_cannot_be_counted_has_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    with using(TINY_DIT):
        config = config_of("DiT-S/8", batch=7)
        assert "working memory" in training_needs(config)
        monkeypatch.setattr(needed, "_saved", lambda _: None)
        assert training_needs(config) == training_needs(config, least=True)


def test_whether_a_model_draws_is_found_without_its_initialisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written number by number to tensors without memory, DiG's convolutions took half a minute."""
    seen: list[str] = []
    whole = torch.nn.init.dirac_
    monkeypatch.setattr(torch.nn.init, "dirac_", lambda t, **k: (seen.append(t.device.type), whole(t, **k))[1])
    assert not draws_in_training(config_of("DiG-S/2", batch=1).model)
    assert set(seen) == {"meta"}

"""The averaged weights: their decay rises, old runs keep theirs, and a warning where they are still the first ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dig.training.average import moving_average, share_of_first_weights
from dig.training.config import TrainConfig
from tests.dig.test_sampling import draw, images
from tests.dig.test_training import train
from tests.dig.test_training_step import config, trained, weights

pytestmark = pytest.mark.usefixtures("tiny_dig")


def test_the_decay_rises_as_the_field_has_it() -> None:
    first, last = torch.tensor([1.0]), torch.tensor([0.0])
    move = moving_average(0.5, warmup=True)
    average = [first.clone()]
    expected = 1.0
    for n in range(1, 30):
        move(average, [last], torch.tensor(float(n)))
        expected *= min(0.5, (1 + n) / (10 + n))
        assert average[0].item() == pytest.approx(expected, rel=1e-5)
    fixed = [first.clone()]
    moving_average(0.5, warmup=False)(fixed, [last], torch.tensor(1.0))
    assert fixed[0].item() == 0.5


def test_an_average_of_few_steps_follows_the_weights() -> None:
    """With 0.9999 and without the warm-up, a hundred steps would leave 99% of the first weights."""
    step = trained(steps=20, learning_rate=1e-2)
    started = weights(trained(steps=0))
    average = torch.cat([p.flatten() for p in step.ema.parameters()])
    assert (average - weights(step)).norm() < 0.3 * (started - weights(step)).norm()
    fixed = trained(steps=20, learning_rate=1e-2, ema_warmup=False)
    average = torch.cat([p.flatten() for p in fixed.ema.parameters()])
    assert (average - weights(fixed)).norm() > 0.9 * (started - weights(fixed)).norm()


def test_the_share_of_the_first_weights() -> None:
    assert share_of_first_weights(400, 0.9999, warmup=False) == pytest.approx(0.961, abs=1e-3)
    assert share_of_first_weights(400, 0.9999, warmup=True) < 1e-3
    assert share_of_first_weights(0, 0.9999, warmup=True) == 1
    assert share_of_first_weights(2, 0.9999, warmup=True) == pytest.approx(2 / 11 * 3 / 12)
    assert share_of_first_weights(10**12, 0.9999, warmup=True) == 0


def test_runs_of_earlier_versions_averaged_without_warmup(data: Path, tmp_path: Path) -> None:
    """Such a run's record has no ``ema_warmup``; the same command goes on with the same bits."""
    old = config(ema_warmup=False).to_json()
    del old["ema_warmup"]
    assert TrainConfig.from_json(old) == config(ema_warmup=False)
    options = ["--ema", "0.99"]
    assert train(data, tmp_path / "whole", "--no-ema-warmup", *options).exit_code == 0
    run = tmp_path / "run"
    assert train(data, run, "--no-ema-warmup", "--steps", "21", *options).exit_code == 0
    record = json.loads((run / "config.json").read_text())
    for name in ("ema_warmup", "sha256", "vae_sha256"):
        (record["config"] if name == "ema_warmup" else record["config"]["data"]).pop(name)
    (run / "config.json").write_text(json.dumps(record))
    for _ in range(2):
        assert train(data, run, *options).exit_code == 0
    ours, theirs = (
        torch.cat([t.flatten() for name, t in sorted(tensors(folder).items()) if name.startswith("ema.")])
        for folder in (run, tmp_path / "whole")
    )
    assert torch.equal(ours, theirs)
    result = train(data, run, "--ema-warmup", *options)
    assert result.exit_code == 2
    assert "--ema-warmup: True, False" in result.output


def tensors(run: Path) -> dict[str, torch.Tensor]:
    from tests.dig.test_training import newest

    return newest(run)


def test_samples_of_the_last_weights_and_a_warning(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = train(data, run, "--steps", "7", "--lr", "1e-2", "--ema", "0.9999", "--no-ema-warmup")
    assert result.exit_code == 0, result.output
    averaged = images(run, tmp_path / "a.npz", "--samples", "2")
    result = draw(run, "--npz", str(tmp_path / "a.npz"), "--samples", "2")
    assert "still 100% the first ones" in result.output.replace("\n", " ")
    raw = images(run, tmp_path / "r.npz", "--samples", "2", "--weights", "raw")
    assert (averaged != raw).any()
    result = draw(run, "--npz", str(tmp_path / "r.npz"), "--samples", "2", "--weights", "raw")
    assert "the first ones" not in result.output
    result = draw(run, "--npz", str(tmp_path / "r.npz"), "--weights", "last")
    assert result.exit_code == 2
    assert "weights must be averaged or raw" in result.output


def test_guidance_that_was_never_trained(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--steps", "7", "--label-dropout", "0", "--grid-every", "7", "--grid-steps", "1"]
    result = train(data, run, *options)
    assert result.exit_code == 0, result.output
    assert "without guidance" in result.output
    for words in (["--cfg", "4"], ["--classes", "null"], ["--cfg", "0"]):
        result = draw(run, "--npz", str(tmp_path / "a.npz"), *words)
        assert result.exit_code == 2, words
        assert "--label-dropout 0" in result.output
    assert draw(run, "--npz", str(tmp_path / "a.npz"), "--cfg", "1", "--samples", "1").exit_code == 0
    shutil.rmtree(run)
    assert train(data, run, "--steps", "7", "--label-dropout", "0.1").exit_code == 0
    result = draw(run, "--npz", str(tmp_path / "a.npz"), "--cfg", "4", "--samples", "1")
    assert result.exit_code == 0
    assert "has seen about 6 images without their label" in result.output.replace("\n", " ")

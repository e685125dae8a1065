"""Several ranks do what one process does: losses, weights, checkpoints, samples, latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dig.sampling.folder import read_png
from dig.training.saving import checkpoint_files, read_checkpoint
from tests.dig.encoded import contents
from tests.dig.parallel_job import at_step, end, printed, start
from tests.dig.test_data_images import make_folder
from tests.dig.tiny import TINY, app, make_fashion, make_vae, using

TRAIN = ["train", "--model", "DiG-S/8", "--batch", "8", "--log-every", "1", "--save-every", "3", "--keep", "9"]
TRAIN += ["--ema", "0.9", "--grid-every", "4", "--grid-steps", "2", "--device", "cpu", "--log", "jsonl"]
TRAIN += ["--lr", "1e-3", "--clip", "0.2", "--workers", "0"]
SAMPLE = ["sample", "--samples", "9", "--steps", "2", "--device", "cpu", "--batch", "2", "--model-batch", "2"]
STOPPED_AT = 4


class Done:
    """What one job of two ranks has left, and what one process does for comparison."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = make_fashion(folder / "data", train=21, test=4)
        self.images = make_folder(folder / "images", {"cat": 7, "dog": 6}, side=20)
        self.vae = make_vae(folder / "vae")
        self.first = folder / "first.pt"
        model = TINY.build("S", input_size=(32, 32), in_channels=1, patch_size=8, num_classes=10)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if not parameter.any():
                # Gates of zero would leave all blocks out of the first steps.
                torch.nn.init.normal_(parameter, std=0.1)
        torch.save(model.state_dict(), self.first)
        self.statuses: list[list[int]] = []

    def train(self, out: str, *options: str, steps: int = 6) -> list[str]:
        words = ["--data", str(self.data), "--init", str(self.first), "--out", str(self.folder / out)]
        return [*TRAIN, *words, "--steps", str(steps), *options]

    def sample(self, name: str) -> list[str]:
        return [*SAMPLE, "--checkpoint", str(self.folder / "one"), "--npz", str(self.folder / f"{name}.npz")]

    def draw(self, name: str) -> list[str]:
        return [*SAMPLE, "--checkpoint", str(self.folder / "one"), "--images", str(self.folder / name)]

    def encode(self, out: str) -> list[str]:
        options = ["--image-size", "16", "--shard-size", "4", "--batch", "3", "--dtype", "fp32", "--device", "cpu"]
        return ["encode", str(self.images), "--out", str(self.folder / out), "--vae", str(self.vae), *options]

    def alone(self, *words: str) -> str:
        with using(TINY):
            result = CliRunner().invoke(app, list(words))
        assert result.exit_code == 0, result.output
        return result.output

    def lines(self, out: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / out / "train.jsonl").read_text().splitlines()]

    def newest(self, out: str) -> dict[str, Tensor]:
        return read_checkpoint(checkpoint_files(self.folder / out / "checkpoints")[0]).tensors


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = Done(tmp_path_factory.mktemp("job"))
    done.alone(*done.train("one"))
    done.alone(*done.train("begun", steps=3))
    commands = [
        done.train("ddp", "--accumulate", "2"),
        # Without --accumulate, for a step of FSDP with no part that waits.
        done.train("fsdp", "--parallel", "fsdp"),
        done.train("bf16", "--parallel", "fsdp", "--dtype", "bf16", "--accumulate", "2", steps=2),
        # Begun by one process, gone on with by two.
        done.train("begun", "--parallel", "fsdp"),
        # The twentieth step of rank 1, all runs together, is the fourth of this one.
        done.train("stopped", "--parallel", "fsdp"),
        done.sample("two"),
        done.draw("pictures"),
        done.encode("latents"),
    ]
    before = 6 + 6 + 2 + 3
    setup = at_step(before + STOPPED_AT - 1, 1, "os.kill(os.getpid(), signal.SIGTERM)")
    ended = end(start(done.folder, commands, setup=setup))
    assert ended == [0, 0], printed(done.folder, 0) + printed(done.folder, 1)
    done.statuses = [json.loads((done.folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return done


def close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    names = {name for name in theirs if not name.startswith("random")}
    assert {name for name in ours if not name.startswith("random")} == names
    for name in names:
        difference = (ours[name].double() - theirs[name].double()).abs().max()
        # AdamW divides by a root of squares: where a gradient is next to nothing, its rounding is all there is.
        assert difference <= tolerance, f"{name}: {difference}"


@pytest.mark.parametrize("run", ["ddp", "fsdp", "begun"])
def test_ranks_train_as_one_process(done: Done, run: str) -> None:
    ours, theirs = done.lines(run), done.lines("one")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for mine, alone in zip(ours, theirs, strict=True):
        assert mine["epoch"] == alone["epoch"]
        for name in ("loss", "mse", "vb", "grad_norm"):
            assert mine[name] == pytest.approx(alone[name], abs=1e-5), (mine["step"], name)
    close(done.newest(run), done.newest("one"), 1e-4)
    grids = [read_png(done.folder / out / "samples" / "step-00000004.png").astype(int) for out in (run, "one")]
    assert abs(grids[0] - grids[1]).max() <= 1


def test_the_epoch_is_the_same_and_whole(done: Done) -> None:
    """21 samples in steps of 8: three steps see each once, and a fourth begins anew, as in one process."""
    losses = [[line["loss"] for line in done.lines(run)] for run in ("one", "ddp")]
    assert len(set(losses[0])) == 6
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_weights_in_bf16_train_nearly_the_same(done: Done) -> None:
    for mine, alone in zip(done.lines("bf16"), done.lines("one")[:2], strict=True):
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-2)
        assert mine["grad_norm"] == pytest.approx(alone["grad_norm"], rel=5e-2)
        assert mine["grad_norm"] != pytest.approx(alone["grad_norm"], rel=1e-5)
    kept = {tensor.dtype for name, tensor in done.newest("bf16").items() if name.startswith("model.")}
    assert kept == {torch.float32}


def test_a_signal_to_one_rank_stops_all_and_saves(done: Done) -> None:
    assert [statuses[4] for statuses in done.statuses] == [130, 130]
    assert [statuses[:4] + statuses[5:] for statuses in done.statuses] == [[0] * 7] * 2
    steps = len(done.lines("stopped"))
    assert STOPPED_AT <= steps < 6
    newest = checkpoint_files(done.folder / "stopped" / "checkpoints")[0]
    assert newest.name == f"step-{steps:08d}.shards"
    events = [json.loads(line) for line in (done.folder / "stopped" / "events.jsonl").read_text().splitlines()]
    assert (events[0]["ranks"], events[0]["parallel"]) == (2, "fsdp")
    assert (events[-1]["event"], events[-1]["step"]) == ("stopped", steps)
    # And one process goes on with what two have saved.
    done.alone(*done.train("stopped"))
    for mine, alone in zip(done.lines("stopped"), done.lines("one"), strict=True):
        assert mine["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    close(done.newest("stopped"), done.newest("one"), 1e-4)


def test_one_rank_speaks(done: Done) -> None:
    first, second = printed(done.folder, 0), printed(done.folder, 1)
    assert "6 steps in" in first
    assert "9 samples in" in first
    assert not [line for line in second.splitlines() if "steps in" in line or "samples in" in line or "error" in line]


def test_shards_hold_parts_and_no_pickle(done: Done) -> None:
    for run in ("ddp", "fsdp"):
        newest = checkpoint_files(done.folder / run / "checkpoints")[0]
        files = sorted(newest.iterdir())
        assert [path.suffix for path in files] == [".json", ".safetensors", ".safetensors"]
        sizes = [path.stat().st_size for path in files[1:]]
        assert 0.3 < sizes[0] / sizes[1] < 3
        assert all(not path.read_bytes().startswith(b"\x80") for path in files)
    assert not list((done.folder / "fsdp" / "checkpoints").glob(".unfinished*"))


def test_consolidate(done: Done) -> None:
    out = done.folder / "alone" / "all.safetensors"
    assert str(out) in done.alone("consolidate", str(done.folder / "fsdp"), "--out", str(out))
    assert list(out.parent.iterdir()) == [out]
    ours, theirs = read_checkpoint(out).tensors, done.newest("fsdp")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    inside = done.folder / "fsdp" / "checkpoints" / "all.safetensors"
    with using(TINY):
        refused = CliRunner().invoke(app, ["consolidate", str(done.folder / "fsdp"), "--out", str(inside)])
    assert refused.exit_code == 2, refused.output
    assert "would count among the checkpoints of a run" in refused.output
    assert not inside.exists()
    pixels = []
    for name, checkpoint in (("file", out), ("folder", done.folder / "fsdp")):
        made = done.folder / f"{name}.npz"
        done.alone(*SAMPLE, "--checkpoint", str(checkpoint), "--npz", str(made))
        pixels.append(np.load(made)["arr_0"])
    assert (pixels[0] == pixels[1]).all()


def test_samples_are_those_of_one_process(done: Done) -> None:
    done.alone(*done.sample("alone"))
    assert (done.folder / "two.npz").read_bytes() == (done.folder / "alone.npz").read_bytes()
    assert not (done.folder / "two.npz.parts").exists()
    done.alone(*done.draw("drawn"))
    ours, theirs = (contents(done.folder / name) for name in ("pictures", "drawn"))
    assert len(ours) == 10
    assert ours == theirs


def test_latents_are_those_of_one_process(done: Done) -> None:
    assert "all ranks' shards are there" in printed(done.folder, 0)
    done.alone(*done.encode("encoded"))
    assert contents(done.folder / "latents") == contents(done.folder / "encoded")

"""A run goes on with what is its own: its data, its checkpoints, its VAE."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dig.training.data import open_dataset
from dig.training.identity import data_sha256
from dig.training.saving import checkpoint_path, read_about
from tests.dig.test_sampling import draw
from tests.dig.test_training import assert_same_run, train
from tests.dig.tiny import make_fashion, write_idx

pytestmark = pytest.mark.usefixtures("tiny_dig")


def class_folders(root: Path, seed: int = 0) -> Path:
    random = np.random.Generator(np.random.Philox(seed))
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(256, size=(16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


def test_other_data_of_the_same_counts(data: Path, tmp_path: Path) -> None:
    other = make_fashion(tmp_path / "other")
    write_idx(other / "train-images-idx3-ubyte.gz", np.full((300, 28, 28), 7))
    assert train(data, tmp_path / "run", "--steps", "2").exit_code == 0
    result = train(other, tmp_path / "run", "--steps", "4")
    assert result.exit_code == 2
    assert "content of the data" in result.output
    moved = shutil.copytree(data, tmp_path / "moved")
    assert train(Path(moved), tmp_path / "run", "--steps", "4").exit_code == 0


def test_what_a_checksum_sees(data: Path, tmp_path: Path) -> None:
    def of(path: Path, **options: Any) -> str:
        return data_sha256(open_dataset(path, **options))

    assert of(data) == of(data)
    assert of(data, mirror=True) == of(data)
    swapped = Path(shutil.copytree(data, tmp_path / "swapped"))
    write_idx(swapped / "train-labels-idx1-ubyte.gz", (np.arange(300) + 1) % 10)
    assert of(swapped) != of(data)
    folders = class_folders(tmp_path / "a")
    same = Path(shutil.copytree(folders, tmp_path / "b"))
    assert of(folders, image_size=16) == of(same, image_size=16)
    content = bytearray((same / "dog" / "3.png").read_bytes())
    content[-20] ^= 1
    (same / "dog" / "3.png").write_bytes(content)
    assert of(folders, image_size=16) != of(same, image_size=16)
    assert of(folders, image_size=16) != of(class_folders(tmp_path / "c", seed=1), image_size=16)
    (folders / "dog" / "3.png").rename(folders / "dog" / "33.png")
    assert of(folders, image_size=16) != of(same, image_size=16)


def header_of(path: Path) -> dict[str, str]:
    return {"dig": json.dumps(read_about(path))}


def put(run: Path, step: int, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """A checkpoint with the record that belongs to it, as someone who means well might make it."""
    from dig.training.data.files import sha256_of

    path = checkpoint_path(run / "checkpoints", step)
    save_file(tensors, path, header)
    path.with_suffix(".json").write_text(json.dumps({"schema": 1, "step": step, "sha256": sha256_of(path)}))


def test_another_runs_checkpoints(data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path / "run", "--steps", "7").exit_code == 0
    assert train(data, tmp_path / "other", "--steps", "7", "--seed", "5").exit_code == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    result = train(data, tmp_path / "run", "--steps", "9")
    assert result.exit_code == 2
    assert "is of another run (seed: 0, 5: this run, there)" in result.output
    result = draw(tmp_path / "run", "--grid", str(tmp_path / "g.png"))
    assert result.exit_code == 2
    assert "is of another run" in result.output
    # By itself a checkpoint stands for itself.
    path = checkpoint_path(tmp_path / "run" / "checkpoints", 7)
    assert draw(path, "--grid", str(tmp_path / "g.png"), "--samples", "1").exit_code == 0


def test_checkpoints_of_other_kinds_of_wrong(data: Path, tmp_path: Path) -> None:
    """Their checksums are right: what is wrong is what they say, or what they hold."""
    run = tmp_path / "run"
    assert train(data, run, "--steps", "7").exit_code == 0
    path = checkpoint_path(run / "checkpoints", 7)
    tensors, about = load_file(path), read_about(path)
    assert about is not None
    bias = "model.t_embedder.mlp.0.bias"

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: tensor for key, tensor in tensors.items() if key != name}

    wrong: list[tuple[dict[str, torch.Tensor], Any, str]] = [
        (tensors, {**about, "step": 6}, "step: 7 by its name, 6"),
        (tensors, {**about, "pending": None}, "pending is None"),
        (tensors, {**about, "pending": 10**400}, "pending is 1000"),
        (tensors, {**about, "seconds": "many"}, "seconds is many"),
        (tensors, {name: value for name, value in about.items() if name != "seconds"}, "'seconds'"),
        (tensors, {**about, "config": 3}, "describes no run"),
        (tensors, {**about, "config": {**about["config"], "batch": "8"}}, "batch must be a whole number; got '8'"),
        (tensors, {**about, "config": {**about["config"], "model": []}}, "must be an object"),
        (tensors, [], "its header is no object"),
        (without("random.cpu"), about, "random.cpu do not fit"),
        (without(bias), about, f"{bias} do not fit"),
        ({**tensors, bias: tensors[bias].double()}, about, f"{bias} do not fit"),
        ({**tensors, bias: tensors[bias][:-1].clone()}, about, f"{bias} do not fit"),
        ({**tensors, bias: tensors[bias] * torch.nan}, about, f"{bias}, which is not finite"),
        ({**tensors, "random.cpu": torch.zeros(3, dtype=torch.uint8)}, about, "random.cpu do not fit"),
    ]
    for changed, says, message in wrong:
        put(run, 7, changed, {"dig": json.dumps(says)})
        result = train(data, run, "--steps", "9")
        assert result.exit_code == 2, message
        assert message in result.output, result.output
        assert result.output.count("error:") == 1
    put(run, 7, tensors, {"dig": "[" * 100_000})
    assert "its header is no object" in train(data, run, "--steps", "9").output
    put(run, 7, tensors, {"dig": json.dumps(about)})
    assert train(data, run, "--steps", "9").exit_code == 0


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "{}", '{"config": 3}', '{"config": {}, "environment": []}', "null", "", "{"]
)
def test_damaged_records_of_a_run(content: str, data: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--steps", "7").exit_code == 0
    (tmp_path / "config.json").write_text(content)
    result = train(data, tmp_path, "--steps", "9")
    assert result.exit_code == 2
    assert "is damaged" in result.output
    assert result.output.count("error:") == 1
    assert draw(tmp_path, "--grid", str(tmp_path / "g.png")).exit_code == 2


def test_a_run_that_came_to_nothing_does_not_block_the_next(data: Path, whole: Path, tmp_path: Path) -> None:
    assert train(data, tmp_path, "--lr", "1e30").exit_code == 2
    assert train(data, tmp_path).exit_code == 0
    assert_same_run(tmp_path, whole)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(data, out).exit_code == 0
    return out


def make_vae(folder: Path, seed: int, channels: int = 4) -> Path:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
    )
    vae.save_pretrained(folder)
    return folder


def test_latents_of_another_vae_and_samples_by_one(tmp_path: Path) -> None:
    from dig.training.data import encode

    ours, theirs = make_vae(tmp_path / "ours", 0), make_vae(tmp_path / "theirs", 1)
    three = make_vae(tmp_path / "three", 0, channels=3)
    pictures = class_folders(tmp_path / "pictures")
    for name, vae in (("latents", ours), ("others", theirs)):
        list(encode(pictures, tmp_path / name, vae=str(vae), image_size=16, device="cpu", workers=1))
    run = tmp_path / "run"
    options = ["--steps", "2", "--batch", "4", "--save-every", "2"]
    assert train(tmp_path / "latents", run, *options).exit_code == 0
    result = train(tmp_path / "others", run, *options)
    assert result.exit_code == 2
    assert "VAE of the latents" in result.output
    result = train(tmp_path / "latents", tmp_path / "grids", *options, "--grid-every", "2", "--vae", str(theirs))
    assert result.exit_code == 2
    assert "is not the one that the latents were made with" in result.output
    words = ["--samples", "1", "--classes", "0"]
    result = draw(run, "--npz", str(tmp_path / "a.npz"), "--vae", str(theirs), *words)
    assert result.exit_code == 2
    assert "is not the one that the latents were made with" in result.output
    result = draw(run, "--npz", str(tmp_path / "a.npz"), "--vae", str(three), *words)
    assert result.exit_code == 2
    assert "decodes 3 channels; the latents have 4" in result.output
    for more in (["--vae", str(ours)], ["--vae", str(theirs), "--other-vae"]):
        result = draw(run, "--npz", str(tmp_path / "a.npz"), *words, *more)
        assert result.exit_code == 0, result.output
    # A beginning with one VAE is none of samples with the other.
    assert json.loads(str(np.load(tmp_path / "a.npz")["about"]))["vae_sha256"]

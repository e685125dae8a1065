"""Training begins with weights in the formats of others: with other classes, another image size, and adapters."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from dig.cli import app
from dig.layers import sincos_position_embedding
from dig.sampling.exporting import export
from dig.sampling.weights import Weights, load_weights
from tests.dig.test_data_latents import write as write_latents
from tests.dig.test_export import weights_of
from tests.dig.test_finetuning import STILL, TABLE, make_classes, parts, said, train
from tests.dig.test_hub import Hub
from tests.dig.tiny import TINY, TINY_DIT, using

runner = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with using(TINY), using(TINY_DIT):
        yield


def base(name: str, **changes: object) -> Weights:
    """Of pixels, 16 a side, and two classes: what `make_classes` makes, which `train` takes."""
    said = {"class_names": ("cat", "dog"), "latent_scale": None, "unlabelled": None, **changes}
    return weights_of(name, channels=3, side=16, classes=2, **said)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data") / "pictures", ("cat", "dog"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("others") / "pictures", ("ape", "dog", "elk"))


FORMATS = [("DiT-S/8", "diffusers"), ("DiG-S/8", "diffusers"), ("DiG-S/8", "safetensors")]


def write(name: str, kind: str, folder: Path) -> tuple[Path, Weights]:
    """Weights as others would hand them over, and what they are."""
    ours = base(name)
    if kind != "meta":
        return export(ours, folder / "out", format=kind).path, ours  # type: ignore[arg-type]
    # Meta's are of latents of a VAE's four channels, 64 pixels an 8x8; its file names no classes.
    ours = weights_of(name, channels=4, side=8, classes=2, class_names=(), latent_scale=None)
    arguments = Namespace(model=name, image_size=64, num_classes=2)
    path = folder / "meta.pt"
    torch.save({"model": {}, "ema": ours.state, "opt": {"state": {}}, "args": arguments}, path)
    return path, ours


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_the_same_classes_and_size_keep_every_bit(name: str, kind: str, data: Path, tmp_path: Path) -> None:
    path, ours = write(name, kind, tmp_path)
    result = train(data, tmp_path / "run", "--init", str(path), *STILL)
    assert result.exit_code == 0, result.output
    assert "label table" not in result.output
    assert "position embedding" not in result.output
    after = parts(tmp_path / "run", "model.")
    assert after.keys() == ours.state.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in ours.state.items())


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_other_classes_and_another_size(name: str, kind: str, others: Path, tmp_path: Path) -> None:
    path, ours = write(name, kind, tmp_path)
    result = train(others, tmp_path / "run", "--init", str(path), *STILL, "--image-size", "32")
    assert result.exit_code == 0, result.output
    assert "label table: 2 classes to 3: 1 of the same name kept, 2 new" in said(result)
    assert "position embedding: 2x2 tokens to 4x4" in said(result)
    after = parts(tmp_path / "run", "model.")
    assert torch.equal(after["pos_embed"], sincos_position_embedding(64, (4, 4)))
    assert torch.equal(after[TABLE][[1, 3]], ours.state[TABLE][[1, 2]])
    rest = ours.state.keys() - {TABLE, "pos_embed"}
    assert all(torch.equal(after[key], ours.state[key]) for key in rest)
    assert load_weights(tmp_path / "run", device="cpu").class_names == ("ape", "dog", "elk")


def test_metas_file_of_latents(tmp_path: Path) -> None:
    path, ours = write("DiT-S/2", "meta", tmp_path)
    latents = write_latents(tmp_path / "latents")
    words = ["train", "--data", str(latents), "--out", str(tmp_path / "run"), "--init", str(path), *STILL]
    result = runner.invoke(app, [*words, "--batch", "4", "--grid-every", "0", "--device", "cpu", "--workers", "0"])
    assert result.exit_code == 0, result.output
    assert "position embedding: 4x4 tokens to 1x1" in said(result)
    assert torch.equal(parts(tmp_path / "run", "model.")[TABLE], ours.state[TABLE])
    after = parts(tmp_path / "run", "model.")
    assert torch.equal(after["blocks.0.attn.qkv.weight"], ours.state["blocks.0.attn.qkv.weight"])


def test_adapters_of_an_exported_folder(others: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder, _ = write("DiT-S/8", "diffusers", tmp_path)
    words = ["--init", str(folder), "--lora", "2", "--steps", "2"]
    result = train(others, tmp_path / "run", *words)
    assert result.exit_code == 0, result.output

    def drawn(name: str, *words: str) -> np.ndarray:
        options = ["--npz", str(tmp_path / name), "--samples", "3", "--steps", "2", "--cfg", "2", "--device", "cpu"]
        result = runner.invoke(app, ["sample", *options, *words])
        assert result.exit_code == 0, result.output
        # Weights that were trained before are neither noise nor new to samples without a label.
        assert "warning" not in result.output
        return np.asarray(np.load(tmp_path / name)["arr_0"])

    adapted = drawn("a.npz", "--checkpoint", str(folder), "--adapter", str(tmp_path / "run"), "--classes", "elk")
    assert np.array_equal(adapted, drawn("b.npz", "--checkpoint", str(tmp_path / "run"), "--classes", "elk"))
    about = json.loads(str(np.load(tmp_path / "a.npz")["about"]))
    assert about["model"] == "DiT-S/8"
    assert len(about["adapter_sha256"]) == 64


def test_a_name_on_the_hub(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, ours = write("DiT-S/8", "diffusers", tmp_path)
    hub = Hub(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", hub.model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.download(huggingface_hub.snapshot_download))
    result = train(data, tmp_path / "run", "--init", "owner/name", *STILL)
    assert result.exit_code == 0, result.output
    assert torch.equal(parts(tmp_path / "run", "model.")[TABLE], ours.state[TABLE])
    # Once there is a checkpoint, the hub may be gone.
    hub.error = OSError("no network")
    result = runner.invoke(app, ["train", "--resume", str(tmp_path / "run"), "--steps", "2"])
    assert result.exit_code == 0, result.output

"""Weights in the formats of others: diffusers' DiT, the authors' files, our own; each read back to the same bits."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import dig
from baselines.declared import FLASH_DIT
from dig.checkpoints import to_release
from dig.cli import app
from dig.registry import parse_model
from dig.sampling.exporting import Format, export
from dig.sampling.trained import HEADER
from dig.sampling.weights import Published, Weights, load_weights
from dig.spec import ModelSpec, create_model
from dig.training.saving import CheckpointError
from tests.dig.tiny import TINY, TINY_DIT, build_dit, using
from tests.helpers import example, randomize, relative_error

runner = CliRunner()
NAMES = ("cat", "dog, big", "tench", "Sneaker", "owl")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with using(TINY), using(TINY_DIT):
        yield


def weights_of(name: str, *, channels: int = 4, side: int = 8, classes: int = 5, **changes: Any) -> Weights:
    torch.manual_seed(7)
    model = randomize(create_model(name, input_size=side, in_channels=channels, num_classes=classes))
    _, options, _ = parse_model(name, "cpu")
    shape: dict[str, Any] = {"input_size": (side, side), "in_channels": channels, "num_classes": classes}
    spec = ModelSpec(name=name, options=options, **shape)
    said = {"class_names": NAMES if classes == 5 else (), "latent_scale": 0.3, "step": 7, "unlabelled": 1e6, **changes}
    return Weights(path=Path("x"), sha256="", spec=spec, state=dict(model.state_dict()), **said)


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_diffusers_model_holds_the_same_numbers_and_computes_the_same(tmp_path: Path) -> None:
    ours = weights_of("DiT-S/2")
    notes = export(ours, tmp_path / "out", format="diffusers").notes
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    held, state = theirs.state_dict(), ours.state
    assert torch.equal(held["transformer_blocks.1.attn1.to_k.weight"], state["blocks.1.attn.qkv.weight"][64:128])
    assert torch.equal(held["proj_out_1.bias"], state["final_layer.adaLN_modulation.1.bias"])
    model = ours.build("cpu")
    x, t, y = example(model, 4)
    with torch.no_grad():
        expected = model(x, t, y)
        # At t = 0 all frequencies give the same; at others diffusers' differ, which `match_frequencies` puts right.
        at_zero = relative_error(theirs(x, t * 0, y).sample, model(x, t * 0, y))
        stock = relative_error(theirs(x, t, y).sample, expected)
        dig.match_frequencies(theirs)
        matched = relative_error(theirs(x, t, y).sample, expected)
        null = torch.full_like(y, 1000)
        guided = relative_error(theirs(x, t, null).sample, model(x, t, torch.full_like(y, model.null_label)))
    assert max(at_zero, matched, guided) < 2e-6
    assert stock > 1e-4
    assert any("match_frequencies" in note for note in notes)


@pytest.mark.parametrize("name", ["DiT-S/2", "Flash-DiT-S/2", "DiG-S/2"])
@pytest.mark.parametrize("format", ["diffusers", "safetensors", "release"])
def test_what_is_written_reads_back_to_the_same_bits(name: str, format: Format, tmp_path: Path) -> None:
    with using(replace(FLASH_DIT, build=build_dit)):
        ours = weights_of(name)
        out = tmp_path / ("out.safetensors" if format == "release" else "out")
        again = load_weights(export(ours, out, format=format).path, device="cpu")
        assert same_bits(again.state, ours.state)
        assert again.to_json() == ours.to_json()
        model, x = ours.build("cpu"), example(ours.build("cpu"))
        assert torch.equal(again.build("cpu")(*x), model(*x))


def test_a_pipeline_samples_in_diffusers(tmp_path: Path) -> None:
    ours = weights_of("DiT-S/2")
    vae = tiny_vae()
    export(ours, tmp_path / "out", format="diffusers", vae=vae)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.vae.config.scaling_factor == 0.3
    assert pipeline.get_label_ids(["tench", "big"]) == [2, 1]
    images = pipeline(class_labels=[2], num_inference_steps=2, guidance_scale=4.0).images
    assert images[0].size == (16, 16)
    # The whole pipeline is read too, its own VAE with it, and one that lies elsewhere.
    again = load_weights(tmp_path / "out", device="cpu")
    assert (again.latent_scale, again.class_names, again.num_classes) == (0.3, NAMES, 5)
    png = tmp_path / "grid.png"
    words = ["sample", "--checkpoint", str(tmp_path / "out"), "--classes", '"dog, big"', "--steps", "2"]
    result = runner.invoke(app, [*words, "--samples", "2", "--grid", str(png), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert png.is_file()


def test_a_pipeline_takes_a_vae_of_its_users(tmp_path: Path) -> None:
    notes = export(weights_of("DiT-S/2"), tmp_path / "out", format="diffusers").notes
    assert any("--vae" in note for note in notes)
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", vae=tiny_vae())
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=[2], num_inference_steps=2).images[0].size == (16, 16)


def tiny_vae() -> Any:
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )


def saved_by_diffusers(folder: Path, *, classes: int = 3, **changes: Any) -> Any:
    torch.manual_seed(5)
    arguments: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "out_channels": 8, "sample_size": 8,
        "num_embeds_ada_norm": classes, **changes,
    }  # fmt: skip
    model = diffusers.DiTTransformer2DModel(**arguments)
    state = model.state_dict()
    for name, tensor in state.items():
        if ".emb." in name and "blocks.0." not in name:
            tensor.copy_(state[name.replace("blocks.1.", "blocks.0.")])
    model.save_pretrained(folder)
    return model


def test_what_diffusers_saved_is_read(tmp_path: Path) -> None:
    theirs = saved_by_diffusers(tmp_path / "pipeline" / "transformer").eval()
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        found = load_weights(folder, device="cpu")
        assert (found.spec.name, found.num_classes, found.image_size, found.latent) == ("DiT-S/2", 3, (64, 64), True)
    model = found.build("cpu")
    x, t, y = example(model)
    with torch.no_grad():
        dig.match_frequencies(theirs)
        # Saved with diffusers' default eps of 1e-5, trained by Meta with 1e-6.
        assert relative_error(model(x, t, y), theirs(x, t, y).sample) < 1e-4
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    assert load_weights(tmp_path / "pipeline", device="cpu").class_names == ("a", "b", "c")
    # As the hub's own DiT is saved: an earlier class, and a pickle.
    inner = tmp_path / "pipeline" / "transformer"
    config = json.loads((inner / "config.json").read_text())
    (inner / "config.json").write_text(json.dumps({**config, "_class_name": "Transformer2DModel"}))
    torch.save(load_file(inner / "diffusion_pytorch_model.safetensors"), inner / "diffusion_pytorch_model.bin")
    (inner / "diffusion_pytorch_model.safetensors").unlink()
    assert same_bits(load_weights(inner, device="cpu").state, found.state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "is of UNet2DModel"),
        ({"num_layers": True}, "num_layers True"),
        ({"sample_size": 10**9}, "sample_size 1000000000"),
        ({"out_channels": 4}, "twice as many out_channels"),
        ({"activation_fn": "silu"}, "activation_fn 'silu'"),
        ({"num_attention_heads": 4}, "none of the sizes"),
        ({"norm_eps": 0.1}, "norm_eps 0.1"),
    ],
)
def test_other_models_of_diffusers_are_told(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path, device="cpu")


def test_weights_that_are_no_dit_are_told(tmp_path: Path) -> None:
    saved_by_diffusers(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    copy = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    for changed, message in (
        ({**state, copy: state[copy] + 1}, f"{copy} differs from the first block's"),
        ({**state, "more": torch.zeros(1)}, "it has more, which DiT has not"),
        ({name: tensor for name, tensor in state.items() if name != "proj_out_2.bias"}, "lacks proj_out_2.bias"),
    ):
        save_file(changed, file)
        with pytest.raises(CheckpointError, match=message):
            load_weights(tmp_path, device="cpu")


def test_metas_file_says_itself_what_it_is(tmp_path: Path) -> None:
    ours = weights_of("DiT-S/2")
    arguments = Namespace(model="DiT-S/2", image_size=64, num_classes=5, data_path="/x", global_batch_size=256)
    torch.save({"model": {}, "ema": ours.state, "opt": {"state": {}}, "args": arguments}, tmp_path / "a.pt")
    found = load_weights(tmp_path / "a.pt", device="cpu")
    assert found.spec.describe() == "DiT-S/2 (backend=materialized), input 4x8x8, 5 classes"
    assert same_bits(found.state, ours.state)
    torch.save({"ema": to_release(weights_of("DiG-S/2").state), "args": Namespace(model="DiG-S/2")}, tmp_path / "b.pt")
    assert load_weights(tmp_path / "b.pt", device="cpu").spec.options["variant"] == "release"
    torch.save({"ema": ours.state, "args": Namespace(model="UViT-H/2")}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"trained as 'UViT-H/2'.*--model"):
        load_weights(tmp_path / "c.pt", device="cpu")


@pytest.mark.parametrize("name", ["DiT-S/2", "DiG-S/2"])
def test_the_authors_names_of_a_model_of_pixels_read_back(name: str, tmp_path: Path) -> None:
    """Their files say nothing of pixels: its first layer's shape does."""
    ours = weights_of(name, channels=3, latent_scale=None)
    done = export(ours, tmp_path / "a.pt", format="release")
    words = next(note for note in done.notes if "--model" in note).split("--model ")[1].split()
    assert words[1:] == ["--image-size", "8", "--num-classes", "5"]
    asked = Published(model=words[0], image_size=8, num_classes=5)
    found = load_weights(done.path, published=asked, device="cpu")
    assert same_bits(found.state, ours.state)
    assert not found.latent
    assert found.image_size == (8, 8)
    x = example(ours.build("cpu"))
    assert torch.equal(found.build("cpu")(*x), ours.build("cpu")(*x))
    with pytest.raises(CheckpointError, match="image size 9 is not a multiple of 2"):
        load_weights(done.path, published=replace(asked, image_size=9), device="cpu")


def test_what_a_file_says_of_itself_is_checked(tmp_path: Path) -> None:
    file = export(weights_of("DiG-S/2"), tmp_path / "out", format="safetensors").path
    state = load_file(file)
    with safe_open(file, framework="pt") as opened:
        said = json.loads(opened.metadata()[HEADER])
    for changed, message in (
        ([], "does not say which model"),
        ({**said, "schema": 9}, "schema 9"),
        ({**said, "latent_scale": "x"}, "latent_scale 'x'"),
        ({**said, "step": -1}, "step -1"),
        ({**said, "class_names": ["a"]}, "names 1 classes of 5"),
        ({**said, "model": {**said["model"], "name": "DiG-Q/2"}}, "cannot be had here"),
        ({**said, "model": {**said["model"], "num_classes": 9}, "class_names": []}, "it has classes 5"),
    ):
        save_file(state, file, {HEADER: json.dumps(changed)})
        with pytest.raises(CheckpointError, match=message):
            load_weights(file, device="cpu").build("cpu")


def invoke(*words: str) -> Any:
    return runner.invoke(app, ["export", *words])


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save(weights_of("DiT-S/2").state, file)
    named = ["--model", "DiT-S/2", "--image-size", "64", "--num-classes", "5"]
    result = invoke(str(file), "--out", str(tmp_path / "pipe"), "--format", "diffusers", *named)
    assert result.exit_code == 0, result.output
    assert f"as diffusers in {tmp_path / 'pipe'}" in result.output
    assert result.output.count("note:") == 2
    assert (tmp_path / "pipe" / "model_index.json").stat().st_mode & 0o777 == file.stat().st_mode & 0o777
    result = invoke(str(tmp_path / "pipe"), "--out", str(tmp_path / "back.pt"), "--format", "release")
    assert result.exit_code == 0, result.output
    assert "sample it with --model DiT-S/2 --image-size 64 --num-classes 5" in result.output
    assert same_bits(torch.load(tmp_path / "back.pt", weights_only=True), torch.load(file, weights_only=True))
    for words, message in (
        (
            [str(file), "--out", str(tmp_path / "pipe"), "--format", "diffusers", *named],
            "exists and is no empty folder",
        ),
        ([str(file), "--out", str(tmp_path / "x"), "--format", "onnx", *named], "format must be one of diffusers"),
        ([str(file), "--out", str(tmp_path / "x"), "--weights", "best", *named], "weights must be averaged or raw"),
        ([str(tmp_path / "pipe"), "--out", str(tmp_path / "x"), *named], "says itself which model it is"),
    ):
        result = invoke(*words)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pt", "pipe", "weights.pt"]


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("dig.sampling.exporting.save_file", full)
    for format in ("diffusers", "safetensors"):
        with pytest.raises(OSError, match="No space"):
            export(weights_of("DiT-S/2"), tmp_path / format, format=format)
        shutil.rmtree(tmp_path / "safetensors", ignore_errors=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"loss": "flow-matching"}, "no scheduler for"), ({"name": "DiG-S/2"}, "--vae is of a DiT")],
)
def test_what_diffusers_has_not(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    ours = weights_of(changes.pop("name", "DiT-S/2"), **changes)
    with pytest.raises(ValueError, match=message):
        export(ours, tmp_path / "out", format="diffusers", vae=tiny_vae())
    assert list(tmp_path.iterdir()) == []

"""Loading and sampling from Python: what the command does, and its bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dig
from dig.cli import app
from dig.environment import ROOT
from dig.sampling.exporting import export
from dig.sampling.runner import default_precision
from dig.sampling.weights import load_weights
from dig.spec import create_model
from tests.dig.test_export import tiny_vae, weights_of
from tests.dig.tiny import TINY, TINY_DIT, make_class_folders, using
from tests.helpers import randomize, relative_error

runner = CliRunner()
NAMES = ("Bag", "Dress", "Sneaker")


@pytest.fixture(scope="module", autouse=True)
def _tiny() -> Iterator[None]:
    with using(TINY), using(TINY_DIT):
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = make_class_folders(folder / "data", NAMES)
    words = [
        "train",
        "--model",
        "DiG-S/8",
        "--image-size",
        "32",
        "--data",
        str(data),
        "--out",
        str(folder / "run"),
        "--steps",
        "3",
    ]
    result = runner.invoke(app, [*words, "--batch", "8", "--lr", "1e-2", "--ema", "0.5", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    return folder / "run"


def test_a_loaded_model_says_what_it_was_trained_with(run: Path, tmp_path: Path) -> None:
    model = dig.load(run)
    trained = model.trained
    assert (trained.num_classes, trained.image_size, trained.latent, trained.step) == (3, (32, 32), False, 3)
    assert trained.class_names == NAMES
    assert trained.choice == "averaged"
    assert not model.training
    raw = dig.load(str(run), weights="raw", device="cpu")
    assert raw.trained.choice == "raw"
    assert not torch.equal(raw.blocks[0].attn.in_proj.weight, model.blocks[0].attn.in_proj.weight)
    latent = dig.load(export(weights_of("DiT-S/2"), tmp_path / "out", format="diffusers").path)
    assert (latent.trained.image_size, latent.trained.latent) == ((64, 64), True)


@pytest.mark.parametrize("chosen", [[1, "Sneaker", None], "1,Sneaker,null"])
def test_the_same_seed_gives_what_the_command_gives(run: Path, tmp_path: Path, chosen: list[int] | str) -> None:
    words = ["sample", "--checkpoint", str(run), "--classes", "1,Sneaker,null", "--cfg", "1.5", "--steps", "3"]
    result = runner.invoke(
        app, [*words, "--samples", "5", "--seed", "11", "--npz", str(tmp_path / "o.npz"), "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    model = dig.load(run, device="cpu").train()
    ours = dig.sample(model, classes=chosen, samples=5, cfg=1.5, steps=3, seed=11)
    assert model.training
    theirs = np.load(tmp_path / "o.npz")
    assert np.array_equal(ours.pixels, theirs["arr_0"])
    assert ours.labels.tolist() == theirs["arr_1"].tolist() == [1, 2, 3, 1, 2]
    assert ours.classes == ("Dress", "Sneaker", "no class", "Dress", "Sneaker")
    assert ours.tensor.shape == (5, 3, 32, 32)
    assert np.array_equal(np.asarray(ours.images[1]), theirs["arr_0"][1])
    assert len(ours) == 5
    assert ours.grid(5).size == (5 * 34 - 2, 32)


def test_latents_are_decoded_as_the_command_decodes_them(tmp_path: Path) -> None:
    folder = export(weights_of("DiT-S/2"), tmp_path / "out", format="diffusers", vae=tiny_vae()).path
    words = ["sample", "--checkpoint", str(folder), "--steps", "2", "--samples", "3", "--device", "cpu"]
    for more in ([], ["--latents"]):
        file = tmp_path / f"{len(more)}.npz"
        result = runner.invoke(app, [*words, *more, "--npz", str(file)])
        assert result.exit_code == 0, result.output
    ours = dig.sample(dig.load(folder, device="cpu"), steps=2, samples=3)
    assert np.array_equal(ours.pixels, np.load(tmp_path / "0.npz")["arr_0"])
    assert np.array_equal(ours.tensor.numpy(), np.load(tmp_path / "1.npz")["latents"])


def test_a_model_of_ones_own_is_sampled_too() -> None:
    model = randomize(create_model("DiG-S/2", input_size=8, in_channels=4, num_classes=3))
    found = dig.sample(model, [0, 2], steps=2, samples=3)
    assert (found.labels.tolist(), found.classes) == ([0, 2, 0], ("0", "2", "0"))
    with pytest.raises(ValueError, match="these are latents: give sample"):
        _ = found.images
    pixels = randomize(create_model("DiG-S/2", input_size=8, in_channels=1, num_classes=3))
    assert dig.sample(pixels, steps=2).images[0].size == (8, 8)


@pytest.mark.parametrize("dtype", ["bf16", "autocast"])
def test_what_is_sampled_in_bf16_is_near_and_leaves_the_model_alone(run: Path, dtype: str) -> None:
    model = dig.load(run, device="cpu")
    exact, rounded = (dig.sample(model, steps=3, samples=2, dtype=chosen).tensor for chosen in (None, dtype))
    assert 0 < relative_error(rounded, exact) < 0.05
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_what_was_cast_is_sampled_as_it_is(run: Path) -> None:
    model = dig.load(run, device="cpu")
    cast = dig.sample(model, steps=3, samples=2, dtype="bf16").tensor
    assert torch.equal(dig.sample(model.bfloat16(), steps=3, samples=2).tensor, cast)


@pytest.mark.parametrize(
    ("family", "backend", "device", "precision"),
    [
        ("DiG", "triton", "cuda", "bf16"),
        ("DiG", "fla", "cuda", "autocast"),
        ("Flash-DiT", "sdpa-cudnn", "cuda", "autocast"),
        ("DiG", "triton", "cpu", "fp32"),
    ],
)
def test_weights_are_cast_where_that_is_faster(family: str, backend: str, device: str, precision: str) -> None:
    assert default_precision(family, backend, device) == precision


def test_what_cannot_be_sampled_is_told(run: Path) -> None:
    model = dig.load(run, device="cpu")
    for options, message in (
        ({"classes": ["Snaker"]}, "did you mean Sneaker"),
        ({"classes": [12]}, "no class @12: this model has 0 to 2"),
        ({"classes": [-1]}, "no class -1"),
        ({"classes": []}, r"classes must be one or more, or None for all; got \[\]"),
        ({"sampler": "euler"}, "trained with the loss hybrid"),
        ({"execution": "graph"}, "needs an NVIDIA GPU"),
        ({"dtype": "fp16"}, "dtype must be bf16, autocast or fp32; got 'fp16'"),
        ({"vae": "x"}, "needs no --vae"),
        ({"samples": 0}, "samples must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dig.sample(model, **options)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"classes": [1.5]}, "classes must be indices, names, or None for no class; got 1.5"),
        ({"classes": [True]}, "classes must be indices, names, or None for no class; got True"),
        ({"classes": 3}, r"classes must be a list of indices and names, \[3, 7\].*; got 3"),
        ({"classes": torch.tensor([1.0, 2.0])}, "classes must be whole numbers; got a Tensor of torch.float32"),
        ({"classes": np.array([1.0])}, "classes must be whole numbers; got a ndarray of float64"),
        ({"classes": {1, 2}}, "classes must be a list of indices and names"),
        ({"seed": None}, "seed must be a whole number; got None"),
        ({"seed": 1.0}, "seed must be a whole number; got 1.0"),
        ({"first": "2"}, "first must be a whole number; got '2'"),
        ({"samples": True}, "samples must be a whole number; got True"),
        ({"steps": 2.5}, "steps must be a whole number; got 2.5"),
        ({"model_batch": [4]}, r"model_batch must be a whole number; got \[4\]"),
        ({"cfg": "x"}, "cfg must be a number; got 'x'"),
        ({"cfg": None}, "cfg must be a number; got None"),
        ({"eta": torch.ones(2)}, r"eta must be a number; got tensor\(\[1., 1.\]\)"),
        ({"sampler": 3}, "sampler must be a text; got 3"),
        ({"cfg_channels": None}, "cfg_channels must be a text; got None"),
        ({"dtype": torch.float32}, "dtype must be a text; got torch.float32"),
        ({"execution": True}, "execution must be a text; got True"),
        ({"vae": 3}, "vae must be a folder or a name on the hub; got 3"),
        ({"other_vae": "yes"}, "other_vae must be True or False; got 'yes'"),
    ]
    for options, message in wrong:
        with pytest.raises(TypeError, match=message):
            dig.sample(model, **options)
    drawn = dig.sample(model, [1], samples=1, steps=1)
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        drawn.grid(columns=0)
    with pytest.raises(TypeError, match="columns must be a whole number; got 'a'"):
        drawn.grid(columns="a")  # type: ignore[arg-type]
    for value, message in (
        ("run", "model must be a dig.layers.Backbone.*got str: dig.load takes"),
        (torch.nn.Linear(1, 1), "model must be a dig.layers.Backbone.*got Linear"),
    ):
        with pytest.raises(TypeError, match=message):
            dig.sample(value)
    for options, message in (
        ({"source": None}, "source must be a path or a name on the hub; got None"),
        ({"source": run, "weights": True}, "weights must be a text; got True"),
        ({"source": run, "device": torch.device("cpu")}, "device must be a text"),
        ({"source": run, "model": "DiG-S/2", "image_size": 2.0}, "image_size must be a whole number; got 2.0"),
        ({"source": run, "model": "DiG-S/2", "num_classes": "3"}, "num_classes must be a whole number; got '3'"),
    ):
        with pytest.raises(TypeError, match=message):
            dig.load(**options)
    with pytest.raises(ValueError, match="together with model"):
        dig.load(run, image_size=3)
    with pytest.raises(ValueError, match="averaged or raw"):
        dig.load(run, weights="best")
    with pytest.raises(ValueError, match="does not exist"):
        dig.load("nowhere.pt")
    with pytest.raises(ValueError, match="device must be"):
        dig.load(run, device="tpu")


def test_weights_are_those_that_were_read(run: Path) -> None:
    state = load_weights(run, device="cpu").state
    assert all(torch.equal(tensor, state[name]) for name, tensor in dig.load(run, device="cpu").state_dict().items())


def test_importing_dig_imports_nothing_heavy() -> None:
    code = "import sys, dig, bench; print({'torch', 'numpy', 'diffusers', 'PIL', 'typer'} & set(sys.modules), dir(dig))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith("set()")

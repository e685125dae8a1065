"""Loading and sampling from Python: what the command does, and its bits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import dig
from dig import registry
from dig.cli import app
from dig.environment import ROOT
from dig.registry import find_family
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
def test_what_is_sampled_in_bf16_is_near(run: Path, dtype: str) -> None:
    model = dig.load(run, device="cpu")
    exact = dig.sample(model, steps=3, samples=2).tensor
    rounded = dig.sample(model.bfloat16() if dtype == "bf16" else model, steps=3, samples=2, dtype=dtype).tensor
    assert 0 < relative_error(rounded, exact) < 0.05


def test_a_model_and_a_precision_that_do_not_fit_are_refused(run: Path) -> None:
    model = dig.load(run, device="cpu")
    with pytest.raises(ValueError, match=r"dtype bf16 is of a model that was cast: model\.to\(torch\.bfloat16\)"):
        dig.sample(model, steps=3, samples=2, dtype="bf16")
    cast = model.bfloat16()
    assert torch.equal(dig.sample(cast, steps=3, samples=2).tensor, dig.sample(cast, steps=3, samples=2).tensor)
    for dtype in ("fp32", "autocast"):
        with pytest.raises(ValueError, match="the model's weights are bf16: sample it with dtype bf16"):
            dig.sample(cast, steps=3, samples=2, dtype=dtype)


def test_the_command_casts_where_it_is_told_to(run: Path, tmp_path: Path) -> None:
    def draw(*options: str) -> np.ndarray:
        path = tmp_path / f"{'-'.join(options) or 'plain'}.npz"
        sampled = CliRunner().invoke(
            app, ["sample", "--checkpoint", str(run), "--samples", "2", "--steps", "3", "--device", "cpu",
                  "--npz", str(path), *options],
        )  # fmt: skip
        assert sampled.exit_code == 0, sampled.output
        return np.asarray(np.load(path)["arr_0"], dtype=np.float32)

    found = {dtype: draw(*(("--dtype", dtype) if dtype else ())) for dtype in ("", "fp32", "bf16", "autocast")}
    assert np.array_equal(found[""], found["fp32"])  # On a CPU.
    assert not np.array_equal(found["bf16"], found["autocast"])
    assert relative_error(torch.from_numpy(found["bf16"]), torch.from_numpy(found["fp32"])) < 0.05


def test_a_family_that_does_not_say_so_is_not_cast(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    family, *rest = registry.parse_name("DiG-S/2")
    monkeypatch.setattr(registry, "parse_name", lambda name: (replace(family, cast=False), *rest))
    arguments = ["sample", "--checkpoint", str(run), "--npz", str(tmp_path / "a.npz"), "--dtype", "bf16"]
    told = CliRunner().invoke(app, arguments)
    assert (told.exit_code, told.stderr) == (
        2, "error: DiG does not say that its models can be cast to bf16: use --dtype autocast\n",
    )  # fmt: skip


def test_precision_where_nobody_says() -> None:
    asked = [(device, cast) for device in ("cuda", "cpu") for cast in (True, False)]
    assert [default_precision(device, cast=cast) for device, cast in asked] == ["bf16", "autocast", "bf16", "fp32"]


@pytest.mark.parametrize("name", ["DiG", "DiT", "Flash-DiT", "DiS"])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_a_family_that_says_so_can_be_cast(name: str, variant: str) -> None:
    """No further from fp32 than under autocast, by half."""
    assert find_family(name).cast
    options = {"variant": variant} if name == "DiG" else {}
    model = randomize(create_model(f"{name}-S/2", image_size=32, **options)).eval()
    inputs = torch.randn(2, 4, 4, 4), torch.tensor([7, 500]), torch.tensor([3, 4])
    with torch.no_grad():
        exact = model(*inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(*inputs).float()
        cast = model.bfloat16()(inputs[0].bfloat16(), *inputs[1:]).float()
    assert relative_error(cast, exact) < max(1.5 * relative_error(rounded, exact), 0.03)


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
